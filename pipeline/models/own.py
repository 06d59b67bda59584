"""Find the function of a user's own network, named module:function.

The module is imported from the current folder or from what is installed. What its function may
return is decided in `contract`.
"""

import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import keras

from pipeline import imports
from pipeline.errors import ConfigError

INSTALLED = tuple(Path(sysconfig.get_path(one)) for one in ("stdlib", "purelib", "platlib"))


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


def files(reference: str) -> dict[str, Path]:
    """Return the files of a network's module and of what it imports of the user's, by name.

    The user's is what is below the current folder or beside the network's module; of an installed
    module only its own top-level package. What is imported by a name made at run time is not seen.

    Raises:
        ConfigError: the module is not there, or importing fails.
    """
    module = _imported(reference.partition(":")[0])
    if not module.__file__:
        return {}
    file = Path(module.__file__).absolute()
    own = file.parents[module.__name__.count(".") + (file.name == "__init__.py")]
    top = module.__name__.partition(".")[0]
    here = Path.cwd()
    known = [Path(entry).absolute() for entry in sys.path]
    places = [here, own, *(one for one in known if one.is_relative_to(here))]

    def root_of(name: str) -> Path | None:
        if name == top:
            return own
        if name in imports.OURS:
            return None
        return next((one for one in places if _is_users(one) and _holds(one, name)), None)

    return imports.closure(module.__name__, root_of)


@contextmanager
def importing() -> Iterator[None]:
    """Have modules of the current folder found first inside the block."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove(here)


def _imported(module: str) -> ModuleType:
    here = str(Path.cwd())
    importlib.invalidate_caches()
    try:
        with importing():
            imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            text = f"there is no module {module} in {here} or among the installed packages"
        else:
            text = f"module {module} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(text) from error
    if here not in sys.path:
        # Last: for what layers import when a model is loaded and called later, and never in the
        # place of an installed package.
        sys.path.append(here)
    return imported


def _is_users(folder: Path) -> bool:
    return not any(folder.is_relative_to(one) for one in INSTALLED)


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()
