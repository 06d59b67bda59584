"""The command line `serve-export`: a server at once, everything else by `service.commands`."""

import os
import sys
from pathlib import Path

from service import launch, options
from service.errors import ServiceError
from service.settings import Settings

WORKER = {"index": int, "statistics": Path}  # what its keeper tells a worker besides the settings


def main() -> None:
    """Run the command that was given; ends the process with its exit status."""
    command, arguments = sys.argv[1:2], sys.argv[2:]
    try:
        if command == ["serve"] and (given := options.read(arguments, os.environ)):
            launch.serve(Settings(**given))
            return
        if command == ["worker"] and (given := options.read(arguments, os.environ, WORKER)):
            own = {name: given.pop(name) for name in WORKER}
            launch.work(Settings(**given), **own)
            return
    except ServiceError as error:
        from service import tables  # noqa: PLC0415  only for who is refused

        tables.show_refusal(error)
        sys.exit(1)
    from service import commands  # noqa: PLC0415  what a server does not need

    commands.app()


if __name__ == "__main__":
    main()
