"""A real Ray cluster of two nodes on this machine, one of which is lost while it works."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from PIL import Image

# Else Ray takes this host's address for 127.0.0.1, and listens on all of them.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

PICTURES, PART_ROWS = 300, 5
SIDE = 1000  # so that a shard takes a while
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "node_ip_address": "127.0.0.1"}
LONGEST_S = 400


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: it has sockets in it
        head = {**NODE, "include_dashboard": False}
        Path(folder, "ray").mkdir()  # where it also notes the cluster's address
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", folder)
            patch.setenv("PREFECT_HOME", f"{folder}/prefect")
            made = Cluster(initialize_head=True, head_node_args=head)
        yield made
        made.shutdown()


def command(*words):
    return (sys.executable, "-m", "pipeline", *map(str, words))


def working(raylet):
    """Return how many processes of a node are at work on a shard, by the title Ray gives them."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes()
            count += parent == raylet and title.startswith(b"ray::score")
    return count


def pictures(folder):
    """Write pictures of one level of gray each, and one that is none; return levels and folder."""
    levels = np.linspace(0, 255, PICTURES).astype(np.uint8)
    folder.mkdir()
    for place, level in enumerate(levels):
        Image.new("L", (SIDE, SIDE), int(level)).save(folder / f"{place:04d}.png", compress_level=1)
    (folder / "0123.png").write_bytes(b"no picture")
    return levels, folder


def test_a_node_that_is_killed_at_work_costs_no_row(cluster, make_bundle, tmp_path, tiny):
    levels, source = pictures(tmp_path / "pictures")
    output = tmp_path / "scores.parquet"
    score = command(
        "score", "--bundle", make_bundle(), "--input", source, "--output", output,
        "--part-rows", PART_ROWS, "--engine", "ray", "--address", cluster.address,
    )  # fmt: skip
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    raylet = second.all_processes["raylet"][0].process.pid

    with subprocess.Popen(
        score, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until = time.monotonic() + LONGEST_S
            while not working(raylet):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.002)
            os.kill(raylet, signal.SIGKILL)
            there = len(list(output.glob("part-*")))
            said, errors = process.communicate(timeout=LONGEST_S)
        finally:
            process.kill()

    assert process.returncode == 0, errors
    assert there < PICTURES / PART_ROWS
    assert f"rows:   {PICTURES} in, {PICTURES} out" in said
    rows = ds.dataset(output).to_table().to_pylist()
    assert [row["path"] for row in rows] == [f"{place:04d}.png" for place in range(PICTURES)]
    assert [place for place, row in enumerate(rows) if row["error"]] == [123]
    images = np.broadcast_to(levels[:, None, None, None], (PICTURES, *tiny.shape))
    best = tiny.logits(images).argmax(axis=1)
    assert all(
        row["label"] == tiny.labels[one]
        for row, one in zip(rows, best, strict=True)
        if not row["error"]
    )


def test_a_damaged_bundle_is_refused_in_one_sentence_by_the_node_that_reads_it(
    cluster, make_bundle, tmp_path
):
    bundle = make_bundle()
    (bundle / "model.onnx").write_bytes(b"")
    Image.new("L", (2, 2)).save(tmp_path / "one.png")

    done = subprocess.run(
        command(
            "score", "--bundle", bundle, "--input", tmp_path, "--output", tmp_path.parent / "out",
            "--engine", "ray", "--address", cluster.address,
        ),
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )  # fmt: skip

    assert done.returncode == 1
    assert "model.onnx has 0 bytes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_that_is_not_there_is_one_sentence(make_bundle, tmp_path):
    done = subprocess.run(
        command(
            "score", "--bundle", make_bundle(), "--input", tmp_path, "--output", tmp_path / "out",
            "--engine", "ray", "--address", "127.0.0.1:1",
        ),
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )  # fmt: skip

    assert done.returncode == 1
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_that_began_here_goes_on_on_a_cluster_and_publishes_nothing(
    cluster, prefect_server, tmp_path
):
    def sweep(rates, *words):
        return subprocess.run(
            command(
                "sweep", "--preset", "line", "--set", "training.epochs=9", "--runs",
                tmp_path / "runs", "--grid", f"training.learning_rate={rates}", *words,
            ),
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            env=prefect_server,
        )  # fmt: skip

    here = sweep("0.05", "--output", tmp_path / "here.csv")
    there = sweep(
        "0.05,100", "--output", tmp_path / "there.json", "--engine", "ray", "--address",
        cluster.address,
    )  # fmt: skip

    assert here.returncode == there.returncode == 0, here.stderr + there.stderr
    (before,) = csv.DictReader((tmp_path / "here.csv").read_text().splitlines())
    assert float(before["validation_loss"]) < 2
    assert "2 combinations, 1 of them done before" in there.stderr
    kept, failed = json.loads((tmp_path / "there.json").read_text())
    assert kept["validation_loss"] == float(before["validation_loss"])
    assert failed["training.learning_rate"] == 100
    assert "lower the learning rate" in failed["failure"]
    assert "training.learning_rate=100: the loss of epoch" in there.stdout
    assert not list(tmp_path.rglob("manifest.json"))
