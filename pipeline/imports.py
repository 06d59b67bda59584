"""Find the files of code that a module runs when it is imported, from their sources alone."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("pipeline", "service", "protos")


def closure(module: str, root_of: Callable[[str], Path | None]) -> dict[str, Path]:
    """Return the files of a module and of all that it imports, directly or not, wherever it does.

    Of a package below another every file counts, since it may choose by name. A file that is no
    Python of this version counts, and nothing that it imports.

    Args:
        module: with dots.
        root_of: gives the folder in which a top-level name is found; None where it is of no
            account.

    Returns:
        By name, relative to that folder, with slashes.
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        root = root_of(name.partition(".")[0])
        if name in seen or root is None:
            continue
        seen.add(name)
        for path in _files(root, name.split(".")):
            relative = path.relative_to(root)
            if relative.as_posix() not in found:
                found[relative.as_posix()] = path
                waiting += _imported(path.read_bytes(), relative.parts[:-1])
    return found


def root_of_ours(top: str) -> Path | None:
    """Return where our packages are; None for any other name."""
    return ROOT if top in OURS else None


def _files(root: Path, parts: list[str]) -> Iterator[Path]:
    """Give the files of a module and those of the packages above it that are run with it."""
    for depth in range(1, len(parts) + 1):
        yield from root.joinpath(*parts[:depth]).glob("__init__.py")
    path = root.joinpath(*parts)
    if len(parts) > 1:
        yield from sorted(path.glob("*.py"))
    source = path.with_name(f"{path.name}.py")
    if source.is_file():
        yield source


def _imported(source: bytes, package: tuple[str, ...]) -> Iterator[str]:
    """Give the names of all modules that a source of a package may import."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
