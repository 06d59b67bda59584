"""Train every combination of some settings, each in a process of its own, and compare them.

Nothing is exported or published. What a combination came to is kept in its folder, below
`runs/sweep`, and taken again as long as data, settings, code and packages are the same; training
that was stopped goes on. Who runs the processes, and where, is `sweep_flow`'s.
"""

import csv
import hashlib
import io
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import config, dataset, files, results
from pipeline.config import Config, DataConfig, GateConfig, TrainingConfig
from pipeline.errors import PipelineError, SweepError
from pipeline.records import Dataset
from service.errors import ServiceError

log = logging.getLogger(__name__)
FOLDER = "sweep"  # below the runs' own
JOB = "sweep.json"  # what is to be trained in a folder
RESULT = "result.json"  # what came of it
LOCK = "lock"
SECTIONS = ("data", "training")
WITHOUT_EFFECT = results.WITHOUT_EFFECT[TrainingConfig]
OPEN = GateConfig(min_accuracy=0.0, champion=False)
running: set[subprocess.Popen[str]] = set()  # of `run`, for who must stop before they end
ENDED = "the process that trained it ended with status"


@dataclass(frozen=True, slots=True)
class Combination:
    """One choice of the grid."""

    values: Mapping[str, Any]  # by the settings' names
    config: Config


@dataclass(frozen=True, slots=True)
class Job:
    """A combination that has its folder."""

    values: Mapping[str, Any]
    folder: Path
    key: str  # of all that its result follows from


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a combination came to.

    Losses and accuracies are those of `records.Epoch` and `records.Scores`, of the best epoch. All
    figures are None where it failed, accuracies also where the model does not classify.
    """

    values: Mapping[str, Any]
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    seconds: float | None = None  # of training
    failure: str = ""
    folder: str = ""


def combinations(
    preset: str, layers: Sequence[config.Tables], grids: Sequence[str]
) -> list[Combination]:
    """Return every combination, the last grid's values changing fastest.

    Args:
        preset: settings to start from.
        layers: over the preset's, as `config.build` takes them.
        grids: SECTION.NAME=VALUE,VALUE,…; values that are no TOML are strings.

    Raises:
        ConfigError: a combination has a setting that there is not, or a value that cannot work.
        SweepError: a grid means nothing.
    """
    names = [_name(one) for one in grids]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
        raise SweepError(
            f"--grid names {twice[0]} twice; give all its values at once"
            if twice
            else "there is no --grid; give one, such as training.learning_rate=0.001,0.01"
        )
    choices = [_values(name, one.partition("=")[2]) for name, one in zip(names, grids, strict=True)]
    found = []
    for chosen in itertools.product(*choices):
        values = dict(zip(names, chosen, strict=True))
        tables = [config.nested(name, value) for name, value in values.items()]
        found.append(Combination(values, config.build(preset, *layers, *tables)))
    return found


def jobs(found: Sequence[Combination]) -> list[Job]:
    """Prepare the data, and write into every combination's folder what is to be trained there.

    Raises:
        DatasetError: data cannot be learnt from.
    """
    prepared: dict[str, Dataset] = {}
    made: list[Job] = []
    for one in found:
        name = json.dumps(_plain(one.config.data), sort_keys=True)
        if name not in prepared:
            prepared[name] = dataset.prepare(one.config.data)
        job = _job(one, prepared[name])
        job.folder.mkdir(parents=True, exist_ok=True)
        content = {"values": job.values, "key": job.key, "config": config.as_tables(one.config)}
        files.write_whole(job.folder / JOB, json.dumps(content, indent=1).encode())
        made.append(job)
    return made


def kept(job: Job) -> Outcome | None:
    """Return what a combination came to in an earlier sweep, if all it follows from is the same."""
    return _kept(job.folder, job.key)


def run(folder: Path) -> Outcome:
    """Train the combination of a folder in a process of its own, which ends if this one does.

    What goes wrong with it is in the outcome.
    """
    content = json.loads((folder / JOB).read_bytes())
    log.info("training %s in %s", described(content["values"]), folder)
    command = (sys.executable, "-m", "pipeline.sweep", str(folder))
    with subprocess.Popen(  # noqa: S603  our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        running.add(process)
        try:
            said = process.stdout.read() if process.stdout else ""
            status = process.wait()
        finally:
            running.discard(process)
            process.terminate()
    outcome = None if status else _kept(folder, content["key"])
    if outcome is not None:
        return outcome
    return lost(folder, said.strip().rpartition("\n")[2] or f"{ENDED} {status}")


def lost(folder: Path, failure: str) -> Outcome:
    """Return the outcome of a combination that has no figures."""
    values = json.loads((folder / JOB).read_bytes())["values"]
    return Outcome(values, failure=failure, folder=str(folder))


def described(values: Mapping[str, Any]) -> str:
    """Return a combination in a line."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return them with the lowest validation loss first, and what failed last."""
    return sorted(outcomes, key=lambda one: (bool(one.failure), one.validation_loss or 0.0))


def as_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a flat row an outcome, a column a setting before the figures."""
    rows = []
    for one in outcomes:
        figures = asdict(one)
        rows.append({**figures.pop("values"), **figures})
    return rows


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """Return them as CSV with a head; there is at least one."""
    rows = as_rows(outcomes)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(folder: Path) -> int:
    """Be the process that trains; write the result, or say in one line why there is none."""
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with files.locked(folder / LOCK, wait=True):  # another one may be saving its state yet
            _train(folder)
    except (PipelineError, ServiceError, OSError) as error:
        with suppress(BrokenPipeError):  # whoever has started us is gone
            sys.stdout.write(f"{' '.join(str(error).split())}\n")
            sys.stdout.flush()
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _train(folder: Path) -> None:
    content = json.loads((folder / JOB).read_bytes())
    if _kept(folder, content["key"]) is not None:
        return
    tables = content["config"]
    chosen = config.build(tables["preset"], tables)
    from pipeline import evaluate, train  # noqa: PLC0415  TensorFlow

    data = dataset.prepare(chosen.data)
    run = train.run_folder(folder, chosen.preset, data, chosen.training)
    trained = train.fit(data, chosen.training, run)
    scores = evaluate.score(trained, data, OPEN)
    best = trained.history[trained.best_epoch - 1]
    outcome = Outcome(
        values=content["values"],
        folder=str(folder),
        validation_loss=best.validation_loss,
        validation_accuracy=best.validation_accuracy if data.classifies else None,
        test_loss=scores.loss,
        test_accuracy=scores.accuracy if data.classifies else None,
        best_epoch=trained.best_epoch,
        epochs=len(trained.history),
        seconds=sum(one.seconds for one in trained.history),
    )
    result = {"key": content["key"], "outcome": asdict(outcome)}
    files.write_whole(folder / RESULT, json.dumps(result, indent=1).encode())


def _end_with_parent() -> None:
    """Stop training, and save its state, once whoever has started us is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _kept(folder: Path, key: str) -> Outcome | None:
    try:
        found = json.loads((folder / RESULT).read_bytes())
        return Outcome(**found["outcome"]) if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _job(one: Combination, data: Dataset) -> Job:
    training = {
        name: value
        for name, value in _plain(one.config.training).items()
        if name not in WITHOUT_EFFECT
    }
    rows = [data.sha256, data.train_rows, data.validation_share, data.split_seed]
    place = _digest([rows, training])
    key = _digest([place, results.code_sha256(__name__), results.packages_sha256()])
    folder = one.config.runs / FOLDER / f"{one.config.preset}-{place[:12]}"
    return Job(one.values, folder, key)


def _plain(section: DataConfig | TrainingConfig) -> dict[str, Any]:
    """Return a section of the settings as JSON can hold it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(section), default=str))
    return found


def _digest(content: Any) -> str:  # noqa: ANN401  what JSON can hold
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _name(grid: str) -> str:
    """Return which setting a grid is of."""
    name, equals, _ = grid.partition("=")
    name = name.strip()
    section, _, setting = name.partition(".")
    if not equals:
        raise SweepError(f"--grid {grid!r} has no =, expected SECTION.NAME=VALUE,VALUE")
    if section not in SECTIONS or not setting:
        raise SweepError(
            f"--grid names {name}, expected a setting of {' or '.join(SECTIONS)}: nothing else "
            "changes what is trained"
        )
    if section == "training" and setting in WITHOUT_EFFECT:
        raise SweepError(f"--grid names {name}, which changes no result")
    return name


def _values(name: str, text: str) -> list[Any]:
    """Return a grid's values: a TOML array without its brackets, or else words between commas."""
    try:
        found: list[Any] = tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        found = [_value(word.strip()) for word in text.split(",")]
    if not found or "" in found:
        raise SweepError(f"--grid {name}={text} has an empty value; give all, with commas between")
    twice = [one for place, one in enumerate(found) if one in found[:place]]
    if twice:
        raise SweepError(f"--grid {name} has the value {twice[0]!r} twice")
    return found


def _value(word: str) -> Any:  # noqa: ANN401  what settings are
    return config.single(f"value={word}")["value"]


def differing(found: Sequence[Combination]) -> Iterator[Config]:
    """Give one configuration for each network and source of data among the combinations."""
    seen = set()
    for one in found:
        what = (one.config.training.architecture, json.dumps(_plain(one.config.data)))
        if what not in seen:
            seen.add(what)
            yield one.config


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
