"""Call every function of one module of clients that takes what is `asked`; tell which failed.

Run in the environment of the strangers: python -m tests.conformance.clients.run MODULE FOLDER
"""

import asyncio
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.clients import asked
from tests.conformance.clients.asked import Asked


def main(name: str, folder: Path) -> int:
    module = importlib.import_module(f"tests.conformance.clients.{name}")
    cases = [case for case in vars(module).values() if is_case(case, module.__name__)]
    failed = [case.__name__ for case in cases if not passes(case, asked.read(folder))]
    sys.stdout.write(f"{len(cases)} asked, failed: {', '.join(failed) or 'none'}\n")
    return 1 if failed or not cases else 0


def is_case(value: object, module: str) -> bool:
    return (
        inspect.isfunction(value)
        and value.__module__ == module
        and list(inspect.signature(value).parameters) == ["asked"]
    )


def passes(case: Callable[[Asked], Any], given: Asked) -> bool:
    try:
        if inspect.iscoroutinefunction(case):
            asyncio.run(case(given))
        else:
            case(given)
    except Exception:  # noqa: BLE001  whatever it is, the others are asked as well
        sys.stdout.write(f"{case.__name__} failed\n{traceback.format_exc()}\n")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
