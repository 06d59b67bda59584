"""Which versions of which models are served.

Finds bundles in a folder, lets a version in only after it passed every check on this host, and
puts a new one in the place of an old one at once. What is refused is kept with its reason, and
never takes the place of what works.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from protos import bundle_pb2, parity_pb2
from service import aliases, bundle, model_config
from service.batch_queue import BatchQueue
from service.batcher import Batcher
from service.errors import (
    BundleError,
    InvalidRequestError,
    LoadError,
    ModelNotFoundError,
    ModelNotReadyError,
    RepositoryError,
    ServiceError,
)
from service.live import Live
from service.model_config import ModelOptions
from service.pace import Pace
from service.sampling import Sampling
from service.session import call_rows
from service.statistics import Figure, Statistics, Store
from service.version import Version

log = logging.getLogger(__name__)
RETIRE_S = 3600.0  # longest wait for an old version's last answers before it is let go
Load = Callable[[Path, ModelOptions], Version]
Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A version that answers requests."""

    version: Version
    batcher: Batcher
    statistics: Statistics
    live: Live
    fingerprint: Fingerprint

    @property
    def manifest(self) -> bundle_pb2.BundleManifest:
        """What the bundle promises."""
        return self.version.manifest

    @property
    def self_check(self) -> parity_pb2.SelfCheck:
        """What was found when it was loaded."""
        return self.version.self_check

    @property
    def options(self) -> ModelOptions:
        """How it is served."""
        return self.version.options

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.name

    @property
    def number(self) -> int:
        """The version's number."""
        return self.manifest.version


class Refusal(NamedTuple):
    """Why a version is not served, and what it was like when that was found.

    It is tried again once its files or its options are others; without either, at each look.
    """

    reason: str
    fingerprint: Fingerprint = ()
    options: ModelOptions | None = None


@dataclass(slots=True)
class Model:
    """What is known of one model; changed only while the repository's lock is held."""

    ready: dict[int, Served] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    loading: set[int] = field(default_factory=set)
    unloading: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)  # on the disk, and not wanted
    aliases: dict[str, int] = field(default_factory=dict)  # as they are in force
    counts: bool = False  # for the server's readiness

    def numbers(self) -> set[int]:
        """Return every version there is."""
        return {*self.ready, *self.refused, *self.loading, *self.unloading, *self.idle}

    def answering(self) -> Served | None:
        """Return the version that answers requests without one."""
        if aliases.CHAMPION in self.aliases:
            return self.ready.get(self.aliases[aliases.CHAMPION])
        return self.ready[max(self.ready)] if self.ready else None


class Repository:
    """The versions found under one folder, `NAME/VERSION/` each.

    `reconcile`, `load` and `unload` may block for long and take turns; everything else returns at
    once. All may be called from any thread.
    """

    def __init__(
        self,
        root: Path,
        *,
        defaults: ModelOptions,
        load: Load,
        statistics: Store | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Store the parts; `reconcile` looks at the disk.

        Args:
            root: the folder.
            defaults: how a model is served whose config.pbtxt says nothing.
            load: checks and loads one version, as `service.version.load`.
            statistics: where each version is counted.
            sampling: where each version's rows are sampled, and what shadows find is kept.
        """
        self._root = root
        self._defaults = defaults
        self._load = load
        self.statistics = statistics or Store()
        self.sampling = sampling or Sampling()
        self._lock = threading.Lock()  # of what is known; never held for long
        self._turn = threading.Lock()  # of those that change it
        self._models: dict[str, Model] = {}
        self._overrides: dict[str, ModelOptions] = {}
        self._looked = False
        self._waits_for_orders = False  # explicit control, before the first load
        self._notes: dict[str, str] = {}
        self._watchers: list[Callable[[], None]] = []
        # How often it has changed which version answers what. Whoever keeps what `get` returned
        # reads it first, and knows by it that it may be another by now.
        self.changes = 0

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call back, from any thread, whenever something becomes ready or is no longer."""
        self._watchers.append(watcher)

    def reconcile(self, until: Callable[[], bool] = lambda: False) -> None:
        """Look at the folder and serve what should be served; what is refused is logged.

        Args:
            until: asked before each version; true ends it there.

        Raises:
            RepositoryError: the folder is not there or cannot be read.
        """
        with self._turn:
            found = scan(self._root)
            lost = not found and any(model.ready for model in self._models.values())
            # A lost mount looks like this; whoever means it stops the server.
            self._note(
                "", f"{self._root} is empty; what was loaded is still served" if lost else ""
            )
            if lost:
                return
            for name in sorted({*found, *self._models}):
                versions = found.get(name, {})
                self._note(name, "" if versions is not None else f"{name}/ cannot be read")
                if versions is not None:
                    self._reconcile_model(name, versions, until)
            whole = not until()
            with self._lock:
                for name, model in list(self._models.items()):
                    model.counts |= bool(model.ready) if self._looked else name in found
                    if not model.numbers():
                        del self._models[name]
                self._looked |= whole
        self._tell()

    def wait_for_orders(self) -> None:
        """List what the folder holds and load nothing: `load` will be called.

        Raises:
            RepositoryError: the folder is not there or cannot be read.
        """
        self.list_folder()
        with self._lock:
            self._looked = self._waits_for_orders = True
        self._tell()

    def list_folder(self) -> None:
        """Note what the folder holds, without loading any of it.

        Raises:
            RepositoryError: the folder is not there or cannot be read.
        """
        found = scan(self._root)
        with self._lock:
            for name in {*found, *self._models}:
                model = self._models.setdefault(name, Model())
                model.idle.clear()
                model.idle = (found.get(name) or {}).keys() - model.numbers()

    def load(self, name: str, options: str | None = None) -> None:
        """Load a model, or load it again, as a request asks.

        Args:
            name: of the model.
            options: a ModelConfig in JSON that stands in for its config.pbtxt.

        Raises:
            InvalidRequestError: the options are not a ModelConfig.
            LoadError: it is not there, or the version that should be served was refused; what was
                served before still is.
        """
        with self._turn:
            before = self._overrides.copy()
            self._overrides.pop(name, None)
            try:
                if options is not None:
                    self._overrides[name] = model_config.parse_json(options, self._defaults)
                self._load_now(name)
            except InvalidRequestError as error:
                self._overrides = before
                raise InvalidRequestError(f"failed to load '{name}', {error}") from error
            except LoadError:
                self._overrides = before
                raise
            finally:
                self._tell()

    def unload(self, name: str) -> None:
        """Stop serving a model; its requests that wait are still answered.

        Raises:
            ModelNotFoundError: it is not known.
        """
        with self._turn:
            if name not in self._models:
                raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
            self._overrides.pop(name, None)
            with self._lock:
                model = self._models[name]
                model.counts = False
                model.idle |= model.ready.keys() | model.refused.keys()
                model.refused.clear()
                unwanted = set(model.ready)
                # With nothing to serve it is as at its start: ready to be told what to load.
                self._waits_for_orders = not any(one.counts for one in self._models.values())
            self._retire(name, unwanted)
        self._tell()

    def get(self, name: str, version: str) -> Served:
        """Return a version that is ready.

        Args:
            name: of the model.
            version: decimal or an alias; empty: the champion where one is set, else the highest
                that is ready.

        Raises:
            InvalidRequestError: the version is neither a number nor an alias.
            ModelNotFoundError: there is no such model or version.
            ModelNotReadyError: there is, but it is loading or was refused.
        """
        with self._lock:
            model = self._models.get(name)
            if model is None:
                raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
            if version:
                return _numbered(name, model, _number(model, version))
            answering = model.answering()
            if answering is not None:
                return answering
            if model.ready:
                number = model.aliases[aliases.CHAMPION]
                raise ModelNotReadyError(
                    f"Request for unknown model: '{name}' has no available versions: "
                    f"its champion, version {number}, is not at ready state"
                )
            raise ModelNotReadyError(
                f"Request for unknown model: '{name}' has no available versions"
            )

    def versions(self) -> list[Served]:
        """Return every version that is ready, by name and number."""
        with self._lock:
            return [
                model.ready[number]
                for _, model in sorted(self._models.items())
                for number in sorted(model.ready)
            ]

    def refused(self) -> dict[tuple[str, int], str]:
        """Return why each refused version was refused, by name and number."""
        with self._lock:
            return {
                (name, number): refusal.reason
                for name, model in sorted(self._models.items())
                for number, refusal in sorted(model.refused.items())
            }

    def states(self) -> list[tuple[str, int, str, str]]:
        """Return name, number, state by Triton's names, and reason of every version there is."""
        with self._lock:
            return [
                (name, number, *_state(model, number))
                for name, model in sorted(self._models.items())
                for number in sorted(model.numbers())
            ]

    def answering(self) -> dict[str, bool]:
        """Tell of every model whether it answers requests that name no version."""
        with self._lock:
            return {name: model.answering() is not None for name, model in self._models.items()}

    def is_ready(self) -> bool:
        """Tell whether every model that counts answers, and at least one is there.

        A model counts from the first look at the folder, or from when it was first ready: one that
        arrives later does not make the server unready, and neither does a bad version of another.
        """
        with self._lock:
            counting = [model for model in self._models.values() if model.counts]
            enough = bool(counting) or self._waits_for_orders
            return self._looked and enough and all(model.answering() for model in counting)

    def close(self) -> None:
        """Take no more requests; what waits is still answered. Returns at once."""
        for served in self.versions():
            served.batcher.close()

    def is_changing(self) -> bool:
        """Tell whether somebody looks at the folder, loads or unloads at this moment."""
        return self._turn.locked()

    def is_idle(self) -> bool:
        """Tell whether no request waits or runs."""
        return all(served.batcher.is_idle() for served in self.versions())

    def _load_now(self, name: str) -> None:
        try:
            found = scan(self._root).get(name)
            options, _ = self._read_options(name)
        except RepositoryError as error:
            raise LoadError(f"failed to load '{name}', the repository cannot be read") from error
        except BundleError as error:
            raise LoadError(f"failed to load '{name}', {error}") from error
        if not found:
            raise LoadError(f"failed to load '{name}', no version is available")
        if not options.policy.choose(sorted(found)):
            raise LoadError(
                f"failed to load '{name}', its version policy chooses none of {sorted(found)}"
            )
        with self._lock:
            model = self._models.setdefault(name, Model())
            model.refused.clear()  # whoever asks again wants it tried again
        self._reconcile_model(name, found, lambda: False)
        with self._lock:
            if model.ready:
                model.counts, self._waits_for_orders = True, False
            reasons = "; ".join(refusal.reason for refusal in model.refused.values())
            serves = "".join(f"; version {number} is served" for number in sorted(model.ready))
        if reasons:
            raise LoadError(f"failed to load '{name}', {reasons}{serves}")

    def _note(self, topic: str, message: str) -> None:
        """Log a lasting trouble once, and not at every look; empty: it is over."""
        if message and self._notes.get(topic) != message:
            log.warning("%s", message)
        self._notes[topic] = message

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher()

    def _reconcile_model(
        self, name: str, found: dict[int, Path], until: Callable[[], bool]
    ) -> None:
        """Serve of one model what its policy and aliases ask for; load before letting go."""
        with self._lock:
            model = self._models.setdefault(name, Model())
        try:
            options, named = self._read_options(name)
        except BundleError as error:
            self._note(f"{name}/", str(error))
            self._refuse_all(model, found, str(error))
            return
        self._note(f"{name}/", "")
        aliased = sorted(set(named.values()) & found.keys(), reverse=True)
        chosen = [*options.policy.choose(sorted(found)), *aliased]
        misses = bool(model.ready) and bool(found) and not chosen
        trouble = f"{name}: its version policy chooses none of {sorted(found)}; nothing is changed"
        self._note(f"{name}/policy", trouble if misses else "")
        if misses:
            return
        with self._lock:
            if not model.ready:  # so that no other version answers in the meantime
                model.aliases = dict(named)
                self.changes += 1
            model.counts &= bool(found)  # a model that was taken away is missed by nobody
            for number in [n for n, refusal in model.refused.items() if refusal.options is None]:
                del model.refused[number]
        wanted: set[int] = set()
        for number in chosen:
            full = 0 < options.policy.latest <= len(wanted)
            if not until() and (number in aliased or not full):
                wanted |= self._ensured(name, model, number, found[number], options)
        if not until():
            self._settle(name, model, found, named, wanted)

    def _settle(
        self,
        name: str,
        model: Model,
        found: dict[int, Path],
        named: dict[str, int],
        wanted: set[int],
    ) -> None:
        """Let aliases point where they should, and go of what is wanted no longer."""
        with self._lock:
            for number in model.refused.keys() - found.keys():
                del model.refused[number]
                self.statistics.drop(name, number)
            model.idle = found.keys() - wanted - model.refused.keys()
            self._apply_aliases(name, model, named)
            unwanted = model.ready.keys() - wanted - set(model.aliases.values())
        self._retire(name, unwanted)
        self._tell()

    def _read_options(self, name: str) -> tuple[ModelOptions, dict[str, int]]:
        folder = self._root / name
        options = self._overrides.get(name) or model_config.read(folder, self._defaults)
        return options, aliases.read(folder)

    def _refuse_all(self, model: Model, found: dict[int, Path], reason: str) -> None:
        """Refuse what is not served yet, because what the folder says of the model is unusable."""
        with self._lock:
            for number in found.keys() - model.ready.keys():
                model.refused[number] = Refusal(reason)

    def _ensured(
        self, name: str, model: Model, number: int, path: Path, options: ModelOptions
    ) -> set[int]:
        """Have a version served; return it, or nothing if it was refused."""
        seen = fingerprint(path)
        served = model.ready.get(number)
        if served and served.fingerprint == seen and served.options == options:
            return {number}
        refusal = model.refused.get(number)
        if refusal and (refusal.fingerprint, refusal.options) == (seen, options):
            return {number} & model.ready.keys()
        with self._lock:
            model.loading.add(number)
        try:
            self._admit(name, model, number, self._load(path, options), seen)
        except ServiceError as error:
            self._refuse(name, model, number, Refusal(str(error), seen, options))
        except Exception:
            log.exception("version cannot be loaded: %s %d", name, number)
            reason = f"{name}/{number} cannot be loaded; the server's log says why"
            self._refuse(name, model, number, Refusal(reason, seen, options))
        finally:
            with self._lock:
                model.loading.discard(number)
        return {number} & model.ready.keys()

    def _refuse(self, name: str, model: Model, number: int, refusal: Refusal) -> None:
        fields = {"model": name, "version": number}
        log.warning("version refused: %s", refusal.reason, extra=fields)
        figures = self.statistics.open(name, number, 1)
        figures.add(Figure.REFUSED)
        figures.set(Figure.READY, float(number in model.ready))
        with self._lock:
            model.refused[number] = refusal

    def _admit(
        self, name: str, model: Model, number: int, version: Version, seen: Fingerprint
    ) -> None:
        """Start a version that passed, and put it in its place at once."""
        check, options = version.self_check, version.options
        figures = self.statistics.open(name, number, options.max_batch_rows)
        for figure, value in (
            (Figure.LOAD_S, check.seconds),
            (Figure.MAX_LOGIT_DIFFERENCE, check.report.logits.max),
            (Figure.MAX_LOGIT_ALLOWED, check.report.budget.max_logit),
            (Figure.AGREEMENT, check.report.agreement),
            (Figure.READY, 1.0),
        ):
            figures.set(figure, value)
        batcher = Batcher(
            version.session.run,
            BatchQueue(
                max_batch_rows=options.max_batch_rows,
                max_queue_rows=options.max_queue_rows,
                max_queue_requests=options.max_queue_requests or float("inf"),
                max_delay_s=options.max_queue_delay_s,
                levels=options.levels,
                enough_rows=call_rows(options.providers),
            ),
            Pace(version.warmed),
            figures,
            name=f"'{name}' version {number}",
            max_batch_rows=options.max_batch_rows,
            instances=options.instances,
        )
        live = self.sampling.add(version.manifest, check.report.budget, batcher)
        batcher.start()
        with self._lock:
            before = model.ready.get(number)
            model.ready[number] = Served(version, batcher, figures, live, seen)
            model.refused.pop(number, None)
            self.changes += 1
        if before is not None:
            before.batcher.close()
        log.info(
            "version ready: %s %d on %s, self-check max |Δlogit| %.2g of %.2g allowed, %.0f ms",
            name,
            number,
            ", ".join(check.providers),
            check.report.logits.max,
            check.report.budget.max_logit,
            check.seconds * 1000,
            extra={"model": name, "version": number},
        )

    def _apply_aliases(self, name: str, model: Model, named: dict[str, int]) -> None:
        """Let each alias point where the file says, once what it points at is ready."""
        were = dict(model.aliases)
        for alias, number in named.items():
            before = model.aliases.get(alias)
            waits = number not in model.ready
            # A first champion takes over from the highest version, which goes on until then.
            unset = alias == aliases.CHAMPION and before is None and bool(model.ready)
            kept = f"; it stays {f'version {before}' if before else 'unset'}"
            keeps = unset or before in model.ready
            trouble = f"{name} {alias} is to be version {number}, which is not ready"
            self._note(f"{name}/{alias}", f"{trouble}{kept if keeps else ''}" if waits else "")
            if waits and keeps:
                continue
            if before != number and not waits:
                log.info("alias set: %s %s is version %d", name, alias, number)
            model.aliases[alias] = number
        for alias in model.aliases.keys() - named.keys():
            del model.aliases[alias]
        self.changes += model.aliases != were

    def _retire(self, name: str, numbers: set[int]) -> None:
        """Take versions out of service; their last answers are waited for in the background."""
        for number in sorted(numbers):
            with self._lock:
                model = self._models[name]
                served = model.ready.pop(number)
                model.unloading.add(number)
                self.changes += 1
            served.statistics.set(Figure.READY, 0.0)
            self.sampling.remove(name, number)
            served.batcher.close()
            log.info(
                "version retired: %s %d", name, number, extra={"model": name, "version": number}
            )
            threading.Thread(target=self._finish, args=(name, model, served), daemon=True).start()

    def _finish(self, name: str, model: Model, served: Served) -> None:
        served.batcher.join(RETIRE_S)
        with self._lock:
            model.unloading.discard(served.number)
            if served.number not in {*model.ready, *model.loading, *model.refused}:
                self.statistics.drop(name, served.number)
        self._tell()


def scan(root: Path) -> dict[str, dict[int, Path] | None]:
    """Return the folder of every version in a repository, by name and number.

    A folder whose name is hidden, not a name, not a number or zero-padded is passed over, and so
    is a link: a staged bundle is hidden until it is renamed into place. A model whose folder
    cannot be read has None.

    Raises:
        RepositoryError: the repository is not there, or cannot be read.
    """
    try:
        models = [path for path in root.iterdir() if bundle.NAME.fullmatch(path.name)]
    except OSError as error:
        raise RepositoryError(
            f"repository {root} cannot be read: {error.strerror}; "
            "publish into it with: train-export run, or name another with --repository"
        ) from error
    found = {model.name: _versions(model) for model in models if not model.is_symlink()}
    return {name: versions for name, versions in found.items() if versions != {}}


def fingerprint(path: Path) -> Fingerprint:
    """Return what tells that a version's files were changed: path, size and time of each."""
    found = []
    try:
        for file in path.rglob("*"):
            status = file.lstat()
            found.append((str(file.relative_to(path)), status.st_size, status.st_mtime_ns))
    except OSError:
        return ()
    return tuple(sorted(found))


def _versions(model: Path) -> dict[int, Path] | None:
    try:
        return {
            int(path.name): path
            for path in model.iterdir()
            if bundle.VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        }
    except NotADirectoryError:
        return {}
    except OSError:
        return None


def _number(model: Model, version: str) -> int:
    if version in model.aliases:
        return model.aliases[version]
    if not re.fullmatch(r"[0-9]{1,18}", version):
        raise InvalidRequestError(
            f"failed to get model version from specified version string '{version}'; "
            "expected a whole number, or an alias"
        )
    return int(version)


def _numbered(name: str, model: Model, number: int) -> Served:
    if number not in model.numbers():
        raise ModelNotFoundError(
            f"Request for unknown model: '{name}' version {number} is not found"
        )
    if number not in model.ready:
        raise ModelNotReadyError(
            f"Request for unknown model: '{name}' version {number} is not at ready state"
        )
    return model.ready[number]


def _state(model: Model, number: int) -> tuple[str, str]:
    if number in model.ready:
        refusal = model.refused.get(number)  # of what its files are by now
        return "READY", f"changed since it was loaded: {refusal.reason}" if refusal else ""
    if number in model.loading:
        return "LOADING", ""
    if number in model.unloading:
        return "UNLOADING", ""
    if number in model.refused:
        return "UNAVAILABLE", model.refused[number].reason
    return "UNAVAILABLE", "unloaded"
