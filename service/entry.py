"""Where `serve-export` begins: Ctrl-C ends it without a traceback while it still imports."""

import sys

INTERRUPTED = 130  # as a shell says it


def main() -> None:
    """Import the program, and run it."""
    try:
        from service.__main__ import main as run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
