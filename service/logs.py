"""How the log looks: lines for people or JSON for machines, and what is said of each call.

What a client sent may stand in any of it, and forges nothing: what is not printable is escaped.
"""

import logging
from dataclasses import asdict, dataclass
from types import TracebackType

MAX_FIELD_CHARACTERS = 128  # of what a client sent, in the access log
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
access_log = logging.getLogger("service.access")


@dataclass(frozen=True, slots=True)
class Call:
    """One call that is over, for the access log; text may be as the client sent it."""

    method: str  # its full path
    code: str  # gRPC's name of the status, such as OK
    seconds: float
    peer: str = ""
    request_id: str = ""
    model: str = ""
    version: str = ""
    rows: int = 0  # answered


def configure(format: str) -> None:
    """Log to standard error, from level INFO on, and nowhere else.

    Args:
        format: `console` or `json`.
    """
    handler = logging.StreamHandler()
    if format == "json":
        from service.json_lines import Json  # noqa: PLC0415  only where it is asked for

        handler.setFormatter(Json())
    else:
        handler.setFormatter(Console())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts changes, which we name
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether gRPC logs more than a caller who left while the answer was sent."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


def access(call: Call) -> None:
    """Log one call to `service.access`: a line, with a field for each of its parts."""
    fields = {
        name: _cut(value) if isinstance(value, str) else value
        for name, value in asdict(call).items()
    }
    parts = "".join(
        f" {name}={_quoted(fields[name])}"
        for name in ("model", "version", "rows", "request_id", "peer")
        if fields[name]
    )
    access_log.info(
        "%s %s %.3f ms%s",
        fields["method"],
        fields["code"],
        call.seconds * 1000,
        parts,
        extra=fields,
    )


def printable(text: str) -> str:
    """Escape line ends, control characters and what turns text around, as Python writes them."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


class Console(logging.Formatter):
    """A line for each event; only the lines of a traceback follow it, and they are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """Return the line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802  logging's name
        """Return the traceback."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802  logging's name
        """Return the stack."""
        return _indented(super().formatStack(stack_info))


def _quoted(value: str | int) -> str:
    return str(value) if isinstance(value, int) else '"' + value.replace('"', '\\"') + '"'


def _cut(text: str) -> str:
    cut = text if len(text) <= MAX_FIELD_CHARACTERS else text[: MAX_FIELD_CHARACTERS - 1] + "…"
    return printable(cut)


def _indented(text: str) -> str:
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))
