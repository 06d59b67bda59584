"""Where the bundles are that a server serves: for test images, and for their other variants.

The server does not give out its files, so the page reads them from a folder, if it was given one.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

from protos import inference_pb2
from service import bundle
from service.bundle import Bundle
from service.errors import BundleError
from service.playground.errors import PlaygroundError

NOT_GIVEN = (
    "start the playground with --models FOLDER, the server's repository, for test images and to "
    "see what the other variants and the original answer"
)
MAX_KEPT = 4  # their golden sets and models are in memory


@dataclass(frozen=True, slots=True)
class Bundles:
    """Bundles in a folder, or only one of them. Safe to use from several threads at once."""

    models: Path | None = None  # has NAME/VERSION
    bundle: Path | None = None  # is NAME/VERSION

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        for given in (self.models, self.bundle):
            if given is not None and not given.is_dir():
                raise PlaygroundError(f"{given} is not a folder")

    def path(self, model: str, version: str) -> Path:
        """Return where a version should be.

        Raises:
            PlaygroundError: no folder was given, or it has no such version.
        """
        if self.models is None and self.bundle is None:
            raise PlaygroundError(NOT_GIVEN)
        names = bundle.NAME.fullmatch(model) and bundle.VERSION.fullmatch(version)
        if self.bundle is not None:
            path = self.bundle.resolve()
            if (path.parent.name, path.name) != (model, version):
                raise PlaygroundError(
                    f"the folder {self.bundle} is {path.parent.name} {path.name}; give "
                    f"--models, the folder that has {model} {version} as well"
                )
            return path
        path = (self.models or Path()) / model / version
        if not names or not (path / bundle.MANIFEST).is_file():
            raise PlaygroundError(
                f"the folder {self.models} has no {model} {version}; give the folder that the "
                "server serves"
            )
        return path


class Reader:
    """Reads bundles once, verified, and makes sure that they are what is served."""

    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles
        self._lock = threading.Lock()
        self._kept: dict[tuple[Path, int], Bundle] = {}

    def read(self, about: inference_pb2.ModelMetadataResponse, version: str) -> Bundle:
        """Return the bundle of a version; reads and hashes its files when it is new.

        Args:
            about: what the server says about the version.
            version: decimal.

        Raises:
            PlaygroundError: it is not there, is damaged, or is another one than is served.
        """
        path = self._bundles.path(about.name, version)
        try:
            found = self._verified(path)
        except (BundleError, OSError) as error:
            raise PlaygroundError(f"the bundle cannot be used: {error}") from error
        served = about.properties.get("model.sha256", "")
        if served and bundle.sha256(found.model) != served:
            raise PlaygroundError(
                f"the folder {path} is another {about.name} {version} than the server's; give the "
                "folder that the server serves"
            )
        return found

    def _verified(self, path: Path) -> Bundle:
        key = path, (path / bundle.MANIFEST).stat().st_mtime_ns
        with self._lock:
            if key not in self._kept:
                if len(self._kept) == MAX_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = bundle.read(path)
            return self._kept[key]
