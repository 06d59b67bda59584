import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service import candidate, version
from service.errors import BundleError
from service.trial import Trials

CPU = ["CPUExecutionProvider"]
WAIT_S = 60  # for what happens within seconds


def attempt(path, *, timeout_s=WAIT_S, providers=CPU):
    Trials().run(path, threads=1, max_batch_rows=8, providers=providers, timeout_s=timeout_s)


def refusal(path, **options):
    with pytest.raises(BundleError) as caught:
        attempt(path, **options)
    assert str(path.parents[1]) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def crashing():
    """Divide the smallest int32 by -1: the processor traps when onnxruntime folds constants."""
    graph = helper.make_graph(
        [helper.make_node("Div", ["smallest", "minus_one"], ["y"])],
        "crashing",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1])],
        [
            numpy_helper.from_array(np.array([-(2**31)], np.int32), "smallest"),
            numpy_helper.from_array(np.array([-1], np.int32), "minus_one"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def endless(tiny):
    """Let the tiny model's logits go round a loop that takes centuries."""
    model = onnx.load_from_string(tiny.model())
    row: list[str | int | None] = ["batch", len(tiny.labels)]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["value"], ["same"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, row),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("same", TensorProto.FLOAT, row),
        ],
    )
    model.graph.node[2].output[0] = "before"
    loop = helper.make_node("Loop", ["rounds", "yes", "before"], ["logits"], body=body)
    model.graph.node.insert(3, loop)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(2**62), "rounds"),
            numpy_helper.from_array(np.array(True), "yes"),
        ]
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def children(pid):
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, file.read_text().split())
    return found


def wait_for(condition):
    end_s = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return value


@pytest.fixture
def hanging(make_bundle, tiny):
    """Return the child's number and a function that waits for the trial's refusal."""
    path = make_bundle(model=endless(tiny))
    refusals = []
    before = set(children(os.getpid()))
    thread = threading.Thread(target=lambda: refusals.append(refusal(path)))
    thread.start()
    child = wait_for(lambda: set(children(os.getpid())) - before).pop()
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, child) == candidate.NICENESS)

    def ended():
        thread.join(WAIT_S)
        return refusals[0]

    yield child, ended
    if thread.is_alive():
        os.kill(child, signal.SIGKILL)
        thread.join(WAIT_S)


def test_good_bundle_passes(make_bundle, capfd):
    path = make_bundle()

    attempt(path)

    assert capfd.readouterr() == ("", "")


def test_reason_is_the_one_that_the_server_itself_would_find(make_bundle, tiny):
    path = make_bundle(model=tiny.model(bias=np.array([127, -127, 1], np.float32)))

    reason = refusal(path)

    assert reason.startswith("tiny/1 fails its self-check on this host: ")
    with pytest.raises(BundleError) as caught:
        version.load(path, candidate.options(threads=1, max_batch_rows=8, providers=CPU))
    assert reason == str(caught.value)


def test_bundle_that_is_not_one_is_refused(make_bundle):
    path = make_bundle()
    (path / "golden.npz").unlink()

    assert refusal(path) == "tiny/1/golden.npz is missing, or not a plain file; publish it again"


def test_refusal_of_onnxruntime_arrives_whole_and_in_one_line(make_bundle):
    graph = helper.make_graph([helper.make_node("Nothing", [], ["y"])], "g", [], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]))
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])

    assert "cannot load the model" in refusal(make_bundle(model=model.SerializeToString()))


def test_options_reach_the_check(make_bundle):
    assert "NoSuchProvider" in refusal(make_bundle(), providers=["NoSuchProvider", *CPU])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors do not trap")
def test_model_that_crashes_onnxruntime_is_refused_and_this_process_lives(make_bundle):
    assert refusal(make_bundle(model=crashing())) == (
        "tiny/1 crashed onnxruntime while it was loaded and checked (SIGFPE); "
        "publish a model that does not"
    )


def test_process_that_is_killed_is_a_refusal(hanging):
    child, ended = hanging

    os.kill(child, signal.SIGKILL)

    assert "crashed onnxruntime while it was loaded and checked (SIGKILL)" in ended()


def test_model_that_does_not_end_is_refused_in_time_and_its_process_is_gone(make_bundle, tiny):
    path = make_bundle(model=endless(tiny))
    before = set(children(os.getpid()))

    assert refusal(path, timeout_s=0.5) == (
        "tiny/1 was not loaded and checked within 0.5 s; "
        "its model does not come to an end, or this host is too busy"
    )
    assert set(children(os.getpid())) == before


def test_process_gives_way_and_sees_no_secrets(monkeypatch, request):
    monkeypatch.setenv("SERVE_EXPORT_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    child, _ = request.getfixturevalue("hanging")

    environment = Path(f"/proc/{child}/environ").read_bytes()
    assert b"secret" not in environment
    assert b"CUDA_VISIBLE_DEVICES" in environment
    assert os.getpriority(os.PRIO_PROCESS, child) > os.getpriority(os.PRIO_PROCESS, 0)
    wait_for(lambda: Path(f"/proc/{child}/oom_score_adj").read_text().strip() == "1000")
    wait_for(lambda: Path(f"/proc/{child}/fd/0").readlink() == Path(os.devnull))
    assert os.getsid(child) == child


def test_process_ends_with_the_one_that_asked(make_bundle, tiny):
    path = make_bundle(model=endless(tiny))
    script = (
        "import sys; from pathlib import Path; from service.trial import Trials\n"
        "Trials().run(Path(sys.argv[1]), threads=1, max_batch_rows=8,"
        " providers=['CPUExecutionProvider'], timeout_s=600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as parent:
        child = wait_for(lambda: children(parent.pid)).pop()
        wait_for(lambda: os.getpriority(os.PRIO_PROCESS, child) == candidate.NICENESS)
        parent.kill()

    wait_for(lambda: not Path(f"/proc/{child}").exists())


def test_process_that_was_asked_for_by_nobody_ends_at_once():
    command = [sys.executable, "-m", "service.candidate", "1"]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "the process that asked for a trial has ended\n"


def test_what_native_code_prints_goes_nowhere(make_bundle, tiny, capfd):
    """onnxruntime writes an error to standard error itself when a node fails."""
    model = onnx.load_from_string(tiny.model())
    model.graph.node[2].output[0] = "before"
    nodes = [
        helper.make_node("ArgMax", ["before"], ["place"], axis=1, keepdims=0),
        helper.make_node("Add", ["place", "far"], ["outside"]),
        helper.make_node("Gather", ["table", "outside"], ["logits"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(3, node)
    table = np.zeros((2, len(tiny.labels)), np.float32)
    for name, value in (("far", np.array(1000)), ("table", table)):
        model.graph.initializer.append(numpy_helper.from_array(value, name))

    assert "cannot run the model" in refusal(make_bundle(model=model.SerializeToString()))
    assert capfd.readouterr() == ("", "")


def test_process_that_fails_by_itself_leaves_its_last_words_in_the_log(make_bundle, capfd):
    rows: Any = "many"

    with pytest.raises(BundleError) as caught:
        Trials().run(make_bundle(), threads=1, max_batch_rows=rows, providers=CPU, timeout_s=WAIT_S)

    assert str(caught.value) == (
        "tiny/1 could not be loaded and checked: the process for it ended with status 1; "
        "the server's log has its last words"
    )
    assert "TypeError" in capfd.readouterr().err


# The process that waits


@pytest.fixture
def trials():
    trials = Trials()
    trials.prepare(candidate.main)
    yield trials
    trials.close()


def waiting(trials):
    return trials._waiting.pid


def run(trials, path):
    trials.run(path, threads=1, max_batch_rows=8, providers=CPU, timeout_s=WAIT_S)


def test_first_trial_is_run_by_the_process_that_waited_and_the_next_by_another(trials, make_bundle):
    child, path = waiting(trials), make_bundle()
    before = set(children(os.getpid()))

    run(trials, path)

    assert child in before
    assert child not in children(os.getpid())
    run(trials, path)
    assert set(children(os.getpid())) == before - {child}


def test_process_that_waited_refuses_like_any_other(trials, make_bundle):
    path = make_bundle()
    (path / "golden.npz").unlink()

    with pytest.raises(BundleError, match=r"golden\.npz is missing"):
        run(trials, path)


def test_process_that_died_while_it_waited_is_no_refusal(trials, make_bundle):
    os.kill(waiting(trials), signal.SIGKILL)
    wait_for(lambda: trials._waiting.poll() is not None)

    run(trials, make_bundle())


def test_process_that_waits_for_nothing_ends_when_it_is_told_so_or_left(trials):
    child = waiting(trials)

    trials.close()
    trials.close()

    assert child not in children(os.getpid())
    left = Trials()
    left.prepare(candidate.main)
    process = left._waiting
    process.stdin.close()
    assert wait_for(lambda: process.poll() is not None)
    assert process.poll() == 0
    left.close()


def test_trial_gets_ready_without_what_takes_long_to_import():
    code = "import sys, service.trial; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

    assert "'service.trial'" in modules
    for slow in ("numpy", "onnxruntime", "grpc", "google.protobuf"):
        assert f"'{slow}'" not in modules


# The fork of a process without other threads


FORKED = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as a server does: no other thread
from pathlib import Path
from service import candidate
from service.errors import BundleError
from service.trial import Fork, Trials

trials = Trials()
trials.prepare(candidate.main)
child = trials._waiting
assert isinstance(child, Fork)
for path in map(Path, sys.argv[1:]):
    try:
        trials.run(
            path, threads=1, max_batch_rows=8, providers=["CPUExecutionProvider"], timeout_s=60
        )
    except BundleError as error:
        print(error)
    else:
        print("passed")
assert child.poll() is not None
trials.close()
"""


def forked(*paths, script=FORKED, **options):
    """Return what a process says whose first trial is a fork of it, and the others are not."""
    command = [sys.executable, "-c", script, *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, **options)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_fork_says_what_a_new_process_would(make_bundle, tiny):
    whole, broken = make_bundle(), make_bundle(name="broken")
    (broken / "golden.npz").unlink()

    for paths in ((whole, broken), (broken, whole)):
        said = dict(zip(paths, forked(*paths), strict=True))
        assert said[whole] == "passed"
        assert "golden.npz is missing" in said[broken]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors do not trap")
def test_fork_that_crashes_leaves_the_process_it_is_of_as_it_was(make_bundle):
    (said,) = forked(make_bundle(model=crashing()))

    assert "crashed onnxruntime while it was loaded and checked (SIGFPE)" in said


def test_fork_without_a_question_ends_with_the_process_it_is_of():
    script = FORKED.partition("for path")[0] + "print(child.pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        wait_for(lambda: os.getsid(child) == child)
        parent.kill()

    wait_for(lambda: not Path(f"/proc/{child}").exists())


def test_fork_works_where_standard_input_and_output_are_closed(make_bundle, tmp_path):
    told = tmp_path / "told"
    script = FORKED.replace("print(", f"Path({str(told)!r}).write_text(")

    assert not forked(make_bundle(), script="import os; os.close(0); os.close(1)\n" + script)
    assert told.read_text() == "passed"


def test_fork_keeps_nothing_that_it_does_not_need(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", "secret")
    script = (
        f"import os; kept = open({str(tmp_path / 'kept')!r}, 'w')\n"
        "from service.trial import Fork\n"
        "def show():\n"
        "    own = '/proc/self/fd/'\n"
        "    files = [os.readlink(own + name) for name in os.listdir(own)[:-1]]\n"
        "    os.write(1, repr([*os.environ, *files]).encode()); return 0\n"
        "with Fork(show) as fork:\n    print(fork.stdout.read().decode())\n"
    )

    (said,) = forked(script=script)

    assert "PATH" in said
    assert "pipe:" in said
    assert "SOME_KEY" not in said
    assert "kept" not in said


@pytest.mark.parametrize("name", ["SERVE_EXPORT_TOKEN", "SERVE_EXPORT_ADMIN_TOKEN"])
def test_trial_is_a_fork_unless_the_environment_has_a_token(monkeypatch, tmp_path, name):
    script = (
        "from pathlib import Path; from service import launch\n"
        "from service.settings import Settings\n"
        "settings = Settings(repository=Path('.')); launch._prepare(settings)\n"
        "with launch._trials(settings) as trials:\n"
        "    print(type(trials._waiting).__name__, trials._waiting.pid)\n"
        "    told = Path(f'/proc/{trials._waiting.pid}/environ').read_bytes()\n"
        "    print(b'sesame' in told)\n"
    )

    assert forked(script=script)[0].startswith("Fork ")
    monkeypatch.setenv(name, "open-sesame-12345")
    kind, told = forked(script=script)
    assert kind.startswith("Popen ")
    assert told == "False"


def test_trial_is_known_to_have_ended_where_signals_of_children_are_ignored(make_bundle):
    script = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "from pathlib import Path; from service import launch\n"
        "from service.settings import Settings\n"
        "launch._prepare(Settings(repository=Path('.')))\n"
    )

    assert forked(make_bundle(), script=script + FORKED) == ["passed"]


def test_fork_that_fails_by_itself_says_why_and_runs_nothing_of_its_origin():
    script = (
        "import atexit; from service.trial import Fork\n"
        "atexit.register(lambda: print('once'))\n"
        "with Fork(lambda: 1 // 0) as fork:\n    print(fork.wait())\n"
    )
    command = [sys.executable, "-c", script]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    assert ended.stdout.split() == ["1", "once"]
    assert "ZeroDivisionError" in ended.stderr
