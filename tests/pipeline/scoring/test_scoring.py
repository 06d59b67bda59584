import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline import files, scoring
from pipeline.errors import BusyError, ScoringError
from pipeline.scoring import local, part, plan
from service.errors import BundleError

ROWS = 10  # in shards of 4, 4 and 2
one_process = partial(local.run, workers=1)


def score(bundle, source, output, engine=one_process, **options):
    return scoring.score(bundle, source, output, engine, **{"shard_rows": 4, **options})


def refusal(*arguments, error=ScoringError, **options):
    with pytest.raises(error) as caught:
        score(*arguments, **options)
    return str(caught.value)


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


@pytest.fixture(autouse=True)
def forget():
    """Load the model anew in every test, as a process of its own would."""
    part._load.cache_clear()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "scores.parquet"


def test_every_picture_has_a_row_with_what_the_model_answers(
    make_bundle, folder, output, tiny, probabilities
):
    told: list[tuple[int, int]] = []

    scored = score(
        make_bundle(), folder(ROWS), output, show=lambda done, rows: told.append((done, rows))
    )

    assert (scored.rows, scored.unread, scored.parts, scored.kept) == (ROWS, 0, 3, 0)
    assert told == [(4, 10), (8, 10), (10, 10)]
    expected = probabilities(tiny.images(ROWS))
    table = ds.dataset(output).to_table()  # leaves out what begins with _
    assert table.column("path").to_pylist() == [f"{n // 4:03d}/{n:04d}.png" for n in range(ROWS)]
    assert np.allclose(table.column("probabilities").to_pylist(), expected, atol=1e-5)
    best = expected.argmax(axis=1)
    assert table.column("label").to_pylist() == [tiny.labels[place] for place in best]
    assert np.allclose(table.column("probability").to_pylist(), expected.max(axis=1), atol=1e-5)
    assert set(table.column("model").to_pylist()) == {"tiny"}
    assert set(table.column("version").to_pylist()) == {1}
    assert table.column("error").null_count == ROWS


def test_a_picture_that_cannot_be_read_has_a_row_with_the_reason_and_stops_no_other(
    make_bundle, folder, output
):
    source = folder(ROWS)
    for name in ("000/0000.png", "001/0006.png"):
        (source / name).write_bytes(b"no picture")

    scored = score(make_bundle(), source, output)

    assert (scored.rows, scored.unread) == (ROWS, 2)
    rows = ds.dataset(output).to_table().to_pylist()
    bad = [place for place, row in enumerate(rows) if row["error"]]
    assert bad == [0, 6]
    assert rows[6]["error"] == "it is not a PNG or JPEG picture"
    assert [rows[6][name] for name in ("label", "probability", "probabilities")] == [None] * 3
    assert all(row["label"] and len(row["probabilities"]) == 3 for row in rows if not row["error"])


def test_a_part_in_which_nothing_can_be_read_is_a_part(make_bundle, folder, output):
    source = folder(4)
    for path in source.rglob("*.png"):
        path.write_bytes(b"")

    assert score(make_bundle(), source, output).unread == 4


def test_rows_of_parquet_are_named_by_file_and_number(
    make_bundle, parquet, pixels, output, tmp_path, tiny, probabilities
):
    parquet("in/b.parquet", pixels=pixels(7))
    parquet("in/a.parquet", pixels=pixels(4, seed=1))

    score(make_bundle(), tmp_path / "in", output)

    table = ds.dataset(output).to_table()
    assert list(zip(*table.select(["path", "row"]).to_pydict().values(), strict=True)) == [
        *(("a.parquet", row) for row in range(4)),
        *(("b.parquet", row) for row in range(7)),
    ]
    images = np.concatenate([tiny.images(4, 1), tiny.images(7)])
    found = table.column("probabilities").to_pylist()
    assert np.allclose(found, probabilities(images), atol=1e-5)


def test_what_does_not_classify_has_its_output_as_a_list_whatever_its_length(
    make_generic_bundle, parquet, output
):
    cells = [[1, 2], [3], None, [4, 5]]
    path = parquet(x=pa.array(cells, pa.list_(pa.float32())))

    scored = score(make_generic_bundle(), path, output)

    table = ds.dataset(output).to_table()
    assert scored.unread == 1
    assert table.column("output").to_pylist() == [[1, 3], [5], None, [7, 9]]
    assert "label" not in table.column_names


def test_several_processes_leave_the_same_files_as_one(make_bundle, folder, output, tmp_path):
    bundle, source = make_bundle(), folder(ROWS)
    score(bundle, source, output)

    score(bundle, source, tmp_path / "two", partial(local.run, workers=2))

    assert contents(tmp_path / "two") == contents(output)
    assert len(contents(output)) == 3


def test_parts_that_are_there_are_not_scored_again(make_bundle, folder, output):
    bundle, source = make_bundle(), folder(ROWS)
    score(bundle, source, output)
    before = contents(output)
    output.joinpath("part-000001.parquet").unlink()
    output.joinpath("part-000002.parquet").write_bytes(before["part-000002.parquet"][:-9])
    asked: list[int] = []

    def engine(job, shards):
        asked.extend(shard.number for shard in shards)
        return one_process(job, shards)

    again = score(bundle, source, output, engine)

    assert asked == [1, 2]
    assert (again.kept, again.parts) == (1, 3)
    assert contents(output) == before


@pytest.mark.parametrize(
    "moment", ["pyarrow.parquet.write_table", "pipeline.files.sync", "pathlib.Path.replace"]
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_process_that_dies_between_two_writes_costs_no_row(
    make_bundle, folder, output, monkeypatch, moment, number
):
    bundle, source = make_bundle(), folder(ROWS)

    class Killed(BaseException):
        pass

    module, _, name = moment.rpartition(".")
    owner = {"pyarrow.parquet": pq, "pipeline.files": files}.get(module, type(output))
    real = getattr(owner, name)
    calls = []

    def dying(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, dying)
        score(bundle, source, output)

    scored = score(bundle, source, output)

    assert scored.rows == ROWS
    assert [len(pq.read_table(path)) for path in sorted(output.glob("part-*"))] == [4, 4, 2]


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_only_whole_parts_and_the_same_command_goes_on(
    make_bundle, folder, output
):
    bundle, source = make_bundle(), folder(800)
    command = (
        sys.executable, "-m", "pipeline", "score", "--bundle", bundle, "--input", source,
        "--output", output, "--part-rows", "2", "--workers", "2",
    )  # fmt: skip
    environment = os.environ | {"NO_COLOR": "1"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        until = time.monotonic() + 60
        while len(contents(output)) < 3 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    there = len(contents(output))
    for path in output.glob("part-*"):
        assert len(pq.read_table(path)) == 2

    done = subprocess.run(command, capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stderr
    assert 3 <= there < 400
    assert "rows:   800 in, 800 out" in done.stdout
    assert len(ds.dataset(output).to_table()) == 800
    assert not list(output.glob(".part*"))


def test_another_bundle_column_input_or_size_of_parts_is_refused_and_changes_nothing(
    make_bundle, parquet, pixels, output
):
    bundle, source = make_bundle(), parquet(a=pixels(5), b=pixels(5, 1))
    score(bundle, source, output, column="a")
    before = {path: path.read_bytes() for path in output.iterdir()}

    assert "tiny version 1 (manifest" in refusal(make_bundle(version=2), source, output, column="a")
    assert "of the column 'a', not of 'b'" in refusal(bundle, source, output, column="b")
    assert "parts of 4 rows, not of 5" in refusal(bundle, source, output, column="a", shard_rows=5)
    os.utime(source, (0, 0))
    assert "of an input that is not this one" in refusal(bundle, source, output, column="a")
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_a_folder_with_files_of_others_is_left_alone(make_bundle, folder, output, tmp_path):
    bundle, source = make_bundle(), folder(2)
    output.mkdir()
    (output / "letter.txt").touch()
    (tmp_path / "file").touch()

    assert "has files of others, such as letter.txt" in refusal(bundle, source, output)
    assert "is a file, expected a folder" in refusal(bundle, source, tmp_path / "file")
    assert "is in what is to be scored" in refusal(bundle, source, source / "scores")
    (output / "letter.txt").unlink()
    (output / "part-000000.parquet").touch()
    assert f"has parts, but no {plan.PLAN}" in refusal(bundle, source, output)
    (output / plan.PLAN).write_text("{")
    assert "is not a plan" in refusal(bundle, source, output)
    (output / plan.PLAN).write_text(json.dumps({"format": 7}))
    assert "a plan of format 7" in refusal(bundle, source, output)


def test_a_plan_by_which_nothing_was_scored_gives_way_to_another(make_bundle, folder, output, tiny):
    wrong = make_bundle(version=2, model=tiny.model(np.array([1000, 0, 0], np.float32)))
    source = folder(2)
    refusal(wrong, source, output, error=BundleError)

    assert score(make_bundle(), source, output).version == 1


def test_the_same_output_is_not_written_by_two_at_once(make_bundle, folder, output):
    bundle, source = make_bundle(), folder(2)
    output.mkdir()

    with files.locked(output / plan.LOCK, wait=False):
        refusal(bundle, source, output, error=BusyError)


def test_a_bundle_that_is_damaged_or_fails_its_golden_set_scores_nothing(
    make_bundle, folder, output, tiny
):
    bundle, source = make_bundle(model=tiny.model(np.array([1000, 0, 0], np.float32))), folder(2)

    assert "fails its self-check on this host" in refusal(bundle, source, output, error=BundleError)
    assert contents(output) == {}
    (bundle / "model.onnx").write_bytes(b"")
    assert "model.onnx has 0 bytes" in refusal(bundle, source, output, error=BundleError)


def test_a_bundle_that_changes_while_it_is_used_stops_the_run(make_bundle, folder, output):
    bundle = make_bundle()

    def engine(job, shards):
        manifest = bundle / "manifest.json"
        manifest.write_text(manifest.read_text() + "\n")
        return one_process(job, shards)

    assert "was changed while it was used" in refusal(bundle, folder(2), output, engine)


def test_rows_that_an_engine_loses_are_noticed(make_bundle, folder, output):
    def engine(job, shards):
        return one_process(job, shards[1:])

    said = refusal(make_bundle(), folder(ROWS), output, engine)

    assert "10 rows went in and 6 are in" in said
    assert "[0]" in said


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_sentence(make_bundle, folder, output, monkeypatch):
    bundle, source = make_bundle(), folder(ROWS)
    monkeypatch.setattr(local, "_begin", partial(os._exit, 9))

    assert "was ended from outside" in refusal(
        bundle, source, output, partial(local.run, workers=2)
    )


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_once_and_leaves_whole_parts(make_bundle, folder, output):
    command = (
        sys.executable, "-m", "pipeline", "score", "--bundle", make_bundle(), "--input",
        folder(2000), "--output", output, "--part-rows", "2", "--workers", "2",
    )  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while len(contents(output)) < 3 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]

    assert process.returncode == 130
    assert "parts that are whole are kept" in said
    assert "Traceback" not in said
    assert 3 <= len(contents(output)) < 900  # of 1000
    assert all(len(pq.read_table(path)) == 2 for path in output.glob("part-*"))


def test_the_log_says_how_long_it_will_take(make_bundle, folder, output, monkeypatch, caplog):
    monkeypatch.setattr(scoring, "TELL_EVERY_S", 0.0)

    with caplog.at_level("INFO", "pipeline"):
        score(make_bundle(), folder(ROWS), output)

    assert any("4 of 10 rows, about" in line for line in caplog.messages)
