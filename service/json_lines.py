"""The log as JSON, for machines."""

import logging
from datetime import UTC, datetime

from pythonjsonlogger.json import JsonFormatter


class Json(JsonFormatter):
    """One object a line: time (RFC 3339), level, logger, message, and every `extra`."""

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={
                "asctime": "time",
                "levelname": "level",
                "name": "logger",
                "exc_info": "exception",
                "stack_info": "stack",
            },
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  logging's name
        """Return when it was, in UTC, to the microsecond."""
        when = datetime.fromtimestamp(record.created, UTC)
        return when.isoformat(timespec="microseconds").replace("+00:00", "Z")
