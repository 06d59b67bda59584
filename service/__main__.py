"""The command line `serve-export`: a server at once, everything else by `service.commands`."""

import os
import sys
from pathlib import Path

from service import launch, options
from service.errors import ServiceError, SettingsError
from service.settings import ENVIRONMENT_PREFIX, Settings

ADDRESS = f"{ENVIRONMENT_PREFIX}ADDRESS"
REFUSED, WRONG = 1, 2  # as `service.command_line` has them
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
        if command == ["health"] and (status := _health(arguments)) is not None:
            sys.exit(status)
    except ServiceError as error:
        from service import tables  # noqa: PLC0415  only for who is refused

        tables.show_refusal(error)
        sys.exit(WRONG if isinstance(error, SettingsError) else REFUSED)
    from service import commands  # noqa: PLC0415  what a server does not need

    commands.app()


def _health(arguments: list[str]) -> int | None:
    """Ask whether a server is there, and return the exit status; None for odd options.

    Containers ask every few seconds: what explains options and colours refusals takes longer than
    to ask.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from service import probe  # noqa: PLC0415  gRPC, which a server imports later

    known = {ADDRESS: os.environ[ADDRESS]} if ADDRESS in os.environ else {}
    given = options.read(arguments, known, of=probe.Question)
    if given is None:
        return None
    try:
        print(probe.ask(probe.Question(**given)))
    except (ServiceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG if isinstance(error, ValueError) else REFUSED
    return 0


if __name__ == "__main__":
    main()
