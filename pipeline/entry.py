"""Where `train-export` begins: Ctrl-C ends it without a traceback while it still imports."""

import sys

INTERRUPTED = 130  # as a shell says it


def main() -> None:
    """Import the program, and run it."""
    try:
        from pipeline.__main__ import app  # noqa: PLC0415

        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
