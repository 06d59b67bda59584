"""Hold every target to its promise: over the corpus always, guided by coverage where asked.

pytest tests/fuzz                                   the corpus, and a few hundred changed inputs
FUZZ_SECONDS=600 pytest tests/fuzz -k guided        as long on each target
FUZZ_RUNS=1000000 pytest tests/fuzz -k guided       as often
"""

import importlib
import importlib.util
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from service.errors import BundleError
from service.trial import Trials
from tests.fuzz import fuzz_model, mutate, signed

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT_BYTES = {"request": 16384, "manifest": 8192, "model": 4096, "golden": 8192}
CHANGED = 300  # inputs of each target, always the same
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
RUNS = int(os.environ.get("FUZZ_RUNS", "0"))  # 0: as many as there is time for
MAX_MIB = 2048  # of memory
SLOW_S = 25  # that one input may take
MEMORY = Path("/dev/shm")  # a disk would set the pace
# Pillow and numpy warn about some inputs; elsewhere a warning is an error.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=MAX_INPUT_BYTES)
def target(request):
    return importlib.import_module(f"tests.fuzz.fuzz_{request.param}")


def peak_mib():
    """Return the most memory this process had: Linux counts it as that of the next, too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def kept(target):
    """Return the corpus of a target, smallest first."""
    folder = CORPUS / target.__name__.rpartition("_")[2]
    return sorted((file.read_bytes() for file in folder.iterdir()), key=len)


def test_promise_is_kept_for_the_corpus(target, make_bundle):
    bundle = make_bundle()
    inputs = [*target.seeds(bundle), *kept(target)]

    with target.running(bundle) as one:
        for content in inputs:
            one(content)


def test_promise_is_kept_for_changed_inputs(target, make_bundle):
    bundle = make_bundle()
    inputs = [*target.seeds(bundle), *kept(target)]
    rng = random.Random(0)

    with target.running(bundle) as one:
        for _ in range(CHANGED):
            content = rng.choice(inputs)
            for _ in range(rng.choice([1, 1, 3])):
                content = target.change(content, rng, lambda part: mutate.some_bytes(part, rng))
            one(content)


def test_corpus_stays_small():
    sizes = [file.stat().st_size for file in CORPUS.glob("*/*")]

    assert 0 < sum(sizes) < 200_000


def test_this_process_outlives_models_that_were_changed(make_bundle):
    bundle = make_bundle()
    write = signed.writer(bundle, "model.onnx")
    seed = (bundle / "model.onnx").read_bytes()
    rng = random.Random(0)
    refused = 0

    for _ in range(6):
        write(fuzz_model.change(seed, rng, lambda part: mutate.some_bytes(part, rng)))
        try:
            Trials().run(
                bundle,
                threads=1,
                max_batch_rows=2,
                providers=["CPUExecutionProvider"],
                timeout_s=30,
            )
        except BundleError as error:
            assert str(bundle.parents[1]) not in str(error)
            refused += 1
    assert refused


@pytest.mark.slow
@pytest.mark.timeout(0)  # libFuzzer has limits of its own
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform"
)
@pytest.mark.parametrize("name", MAX_INPUT_BYTES)
def test_promise_is_kept_for_what_a_fuzzer_finds_guided(name, make_bundle, tmp_path, capsys):
    found, seeds, broken = (tmp_path / folder for folder in ("found", "seeds", "broken"))
    for folder in (found, seeds, broken):
        folder.mkdir()
    options = [
        f"-runs={RUNS}" if RUNS else f"-max_total_time={SECONDS}",
        f"-max_len={MAX_INPUT_BYTES[name]}",
        f"-artifact_prefix={broken}/",
        f"-rss_limit_mb={max(MAX_MIB, 64 + peak_mib())}",
        f"-timeout={SLOW_S}",
    ]
    log = tmp_path / "log"

    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as root,
        log.open("w") as output,
    ):
        bundle = make_bundle(Path(root))
        module = importlib.import_module(f"tests.fuzz.fuzz_{name}")
        for place, content in enumerate(module.seeds(bundle)):
            (seeds / str(place)).write_bytes(content)
        command = [sys.executable, "-m", "tests.fuzz.guided", name, str(bundle), *options]
        ended = subprocess.run(
            [*command, str(found), str(seeds), str(CORPUS / name)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Two ways of counting what is executed get in each other's way.
            env={key: value for key, value in os.environ.items() if "COVERAGE" not in key},
            check=False,
        )

    said = log.read_text(errors="replace")
    inputs = [f"{file}: {file.read_bytes()!r:.2000}" for file in broken.iterdir()]
    assert ended.returncode == 0, "\n".join([said[-6000:], *inputs])
    assert "DONE" in said
    with capsys.disabled():
        print("", name, *(line for line in said.splitlines() if "DONE" in line))  # noqa: T201
