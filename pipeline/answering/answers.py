"""Have every variant of a bundle answer the same rows, and say each answer as soon as it is there.

A thread for each runtime: what ONNX answers does not wait the ten seconds that TensorFlow takes to
start. A model is loaded when it is first asked, and kept.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import CheckError
from pipeline.runtimes import Array, open_model
from protos import bundle_pb2
from service import bundle

CALLS = 3  # timed, for a question; others use the same cores meanwhile, such as who starts
LOOK_S = 0.5  # between two looks whether who asked is still there
Say = Callable[[dict[str, Any]], None]
Run = Callable[[Array], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Variant:
    """A published file, or a SavedModel's folder, of a bundle."""

    name: str
    path: Path
    options: bundle_pb2.SessionOptions | None  # for onnxruntime; None: the usual ones


@dataclass(frozen=True, slots=True)
class Question:
    """Rows, and what they are called in the answers."""

    id: object  # whatever JSON has
    rows: Array  # (rows, ...), of the model's input


def answer(path: Path, lines: Iterable[str], say: Say) -> None:
    """Answer questions until there are no more.

    Args:
        path: the bundle, NAME/VERSION.
        lines: a question each, JSON: {"id": 1, "rows": [[...]]}, in the dtype of the model's input.
        say: given {"variants": [...]}, the names, at first. Then an answer for each question and
            variant, in the order in which they are ready: {"id": 1, "variant": "onnx-int8",
            "outputs": [[...]], "seconds": 0.002}, the rows of the output that parity is measured on
            and the time in the model, the best of 3 calls; or {"id": 1, "variant": "...",
            "error": "..."}. A line that is no question is answered {"error": "..."}. Called from
            several threads, one at a time.

    Raises:
        BundleError: the bundle is not what its manifest promises.
    """
    content = bundle.read(path)
    manifest = content.manifest
    variants = _variants(path, manifest)
    lock = threading.Lock()

    def say_alone(message: dict[str, Any]) -> None:
        with lock:
            say(message)

    say_alone({"variants": [one.name for one in variants]})
    output, row = bundle.checked_output(manifest), content.golden.inputs[:1]
    groups = [_Group(alike, output, say_alone) for alike in _by_runtime(variants)]
    parent = os.getppid()
    for line in lines:
        try:
            question = _question(line, row)
        except (ValueError, TypeError, KeyError) as error:
            say_alone({"error": f"the line is no question: {error}"})
            continue
        for group in groups:
            group.ask(question)
    for group in groups:
        group.finish(wanted=lambda: os.getppid() == parent)


def _variants(path: Path, manifest: bundle_pb2.BundleManifest) -> list[Variant]:
    """Return what was published and is still there; of a folder, only files with a digest."""
    listed = {file.path for file in manifest.files}
    found = []
    for report in manifest.parity:
        whole = path / report.path
        if not report.passed or not report.path or not whole.exists():
            continue
        inside = (
            [one for one in whole.rglob("*") if not one.is_dir()] if whole.is_dir() else [whole]
        )
        if all(one.relative_to(path).as_posix() in listed for one in inside):
            options = manifest.session if report.path == bundle.MODEL else None
            found.append(Variant(report.variant, whole, options))
    return found


def _by_runtime(variants: list[Variant]) -> Iterator[list[Variant]]:
    """Give the variants that one runtime answers; those of a SavedModel, which has none, last."""
    for suffix in (".onnx", ".tflite", ""):
        alike = [one for one in variants if one.path.suffix == suffix]
        if alike:
            yield alike


def _question(line: str, like: Array) -> Question:
    asked = json.loads(line)
    given = np.array(asked["rows"])
    with np.errstate(invalid="ignore"):
        rows = given.astype(like.dtype)
    if rows.shape[1:] != like.shape[1:] or not len(rows):
        raise ValueError(
            f"its rows have the shape {list(given.shape)}, expected [rows, "
            f"{', '.join(map(str, like.shape[1:]))}]"
        )
    if not np.array_equal(rows.astype(np.float64), given.astype(np.float64)):
        raise ValueError(f"its rows have values that are no {like.dtype}")
    return Question(asked.get("id"), rows)


def _timed(run: Run, rows: Array) -> tuple[float, dict[str, Array]]:
    started_s = time.monotonic()
    found = run(rows)
    return time.monotonic() - started_s, found


class _Group:
    """The variants of one runtime, and the thread that has them answer."""

    def __init__(self, variants: list[Variant], output: str, say: Say) -> None:
        self._variants, self._output, self._say = variants, output, say
        self._opened: dict[str, Run] = {}
        self._lite: _LiteProcess | None = None
        self._waiting: queue.Queue[Question | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> None:
        self._waiting.put(question)

    def finish(self, wanted: Callable[[], bool]) -> None:
        """Wait until everything is answered, or nobody wants it any more."""
        self._waiting.put(None)
        while self._thread.is_alive() and wanted():
            self._thread.join(LOOK_S)

    def _work(self) -> None:
        for question in iter(self._waiting.get, None):
            for variant in self._variants:
                said = {"id": question.id, "variant": variant.name}
                try:
                    self._say(said | self._answer(variant, question.rows))
                except CheckError as error:
                    self._say(said | {"error": str(error)})
        if self._lite is not None:
            self._lite.close()

    def _answer(self, variant: Variant, rows: Array) -> dict[str, Any]:
        if variant.name not in self._opened:
            self._opened[variant.name] = self._open(variant)
            self._opened[variant.name](rows)  # the first call of most runtimes is a slow one
        run = self._opened[variant.name]
        seconds, found = min((_timed(run, rows) for _ in range(CALLS)), key=itemgetter(0))
        if self._output not in found:
            raise CheckError(f"{variant.path} has the outputs {sorted(found)}, not {self._output}")
        outputs = found[self._output].astype(np.float32)
        return {"outputs": outputs.tolist(), "seconds": seconds}

    def _open(self, variant: Variant) -> Run:
        if variant.path.suffix != ".tflite":
            return open_model(variant.path, options=variant.options).run
        if self._lite is None:
            self._lite = _LiteProcess([one.path for one in self._variants])
        lite, place = self._lite, self._variants.index(variant)
        return lambda rows: lite.run(place, rows)


class _LiteProcess:
    """`lite`, as a process that ends when its standard input is closed, by us or by our death."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._process: subprocess.Popen[str] | None = None

    def run(self, place: int, rows: Array) -> dict[str, Array]:
        """Answer rows with one of the files; raises CheckError if it does not."""
        if self._process is None:
            self._process = self._start()
        asked = {"file": place, "dtype": rows.dtype.name, "rows": rows.tolist()}
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None  # noqa: S101  they are pipes
        assert writer is not None  # noqa: S101
        try:
            writer.write(json.dumps(asked) + "\n")
            writer.flush()
            line = reader.readline()
        except OSError:
            line = ""
        if not line:
            raise CheckError(f"TFLite's runtime ended with status {self.close()}")
        said = json.loads(line)
        if "error" in said:
            raise CheckError(f"TFLite's runtime says: {said['error']}")
        return {name: np.array(values, np.float32) for name, values in said["outputs"].items()}

    def close(self) -> int:
        """End it, and return its exit status; the next rows start another."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with process, suppress(OSError):  # what it was not to read any more
            process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-m", "pipeline.answering.lite", *map(str, self._paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
