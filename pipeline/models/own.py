"""Find the function of a user's own network, named module:function.

The module is imported from the current folder or from what is installed. What its function may
return is decided in `contract`.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import keras

from pipeline.errors import ConfigError


def find(reference: str) -> Callable[..., keras.Model]:
    """Import a module and return its function.

    Raises:
        ConfigError: the module or the function is not there, or importing fails.
    """
    module, _, name = reference.partition(":")
    imported = _imported(module)
    function = getattr(imported, name, None)
    if function is None:
        raise ConfigError(f"module {module} has no function {name!r}; expected module:function")
    if not callable(function):
        raise ConfigError(
            f"{reference} is a {type(function).__name__}, expected a function "
            "(shape, outputs, **settings) that returns a keras.Model"
        )
    return function  # type: ignore[no-any-return]


def file(reference: str) -> tuple[Path, ...]:
    """Return the file of a network's module; none if it has none.

    Raises:
        ConfigError: the module is not there, or importing fails.
    """
    path = _imported(reference.partition(":")[0]).__file__
    return (Path(path),) if path else ()


def _imported(module: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            text = f"there is no module {module} in {here} or among the installed packages"
        else:
            text = f"module {module} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(text) from error
    finally:
        sys.path.remove(here)
