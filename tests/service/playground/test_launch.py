import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from service import commands
from service.errors import SettingsError
from service.playground import launch


@pytest.mark.parametrize(
    ("listen", "found"),
    [
        ("127.0.0.1:7860", ("127.0.0.1", 7860)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_where_to_listen_is_host_and_port(listen, found):
    assert launch.parsed(listen) == found


@pytest.mark.parametrize("listen", ["7860", "127.0.0.1", "127.0.0.1:", "a:b", "127.0.0.1:65536"])
def test_what_is_no_host_and_port_is_refused(listen):
    with pytest.raises(SettingsError, match="expected HOST:PORT"):
        launch.parsed(listen)


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_what_only_this_host_reaches_is_known(host, only_here):
    assert launch.is_loopback(host) == only_here


@pytest.fixture
def start():
    """Return a function that starts the command on a free port; what is left of it is killed."""
    started = []

    def start(*options, env=None):
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "playground", "--listen", "127.0.0.1:0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("playground on http://127.0.0.1:"), process.stderr.read()
        return process, line.split()[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_page_cleanly_while_a_browser_watches(start, number):
    process, url = start("--address", "127.0.0.1:1")
    with urllib.request.urlopen(f"{url}/api/live", timeout=30) as events:
        assert b'"up": false' in events.readline()
        process.send_signal(number)

        output, errors = process.communicate(timeout=60)

    assert (process.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_page_cleanly_while_the_original_still_starts(
    start, served, number, tmp_path
):
    address, models = served
    (tmp_path / "tensorflow.py").write_text("import time\ntime.sleep(600)\n")
    slow = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process, url = start("--address", address, "--models", str(models), env=slow)
    request = urllib.request.Request(f"{url}/api/answer?model=tiny&row=0", data=b"")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b'"served"' in answer.readline()
        process.send_signal(number)

        output, errors = process.communicate(timeout=60)

    assert (process.returncode, output, errors) == (0, "", "")


def children(process):
    """Return the processes that a process has started, and those that they have."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    own = [child for child, parent in pairs if parent == process]
    return [*own, *(grandchild for child in own for grandchild in children(child))]


def is_running(process):
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_of_the_variants_ends_with_the_page(start, served, number):
    address, models = served
    process, url = start("--address", address, "--models", str(models))
    request = urllib.request.Request(f"{url}/api/answer?model=tiny&row=0", data=b"")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b'"probabilities"' in answer.read()
    left = children(process.pid)
    assert left

    os.kill(process.pid, number)
    process.wait(60)

    until_s = time.monotonic() + 60
    while any(map(is_running, left)) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not any(map(is_running, left))


def run(*options):
    return CliRunner().invoke(commands.app, ["playground", *options])


def test_an_address_that_is_taken_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("--listen", f"127.0.0.1:{taken.getsockname()[1]}")

    assert result.exit_code == 1
    assert "cannot listen on 127.0.0.1:" in result.output
    assert "another process listens there already" in result.output
    assert "choose another with --listen HOST:PORT" in result.output


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--models", "a", "--bundle", "b"], 2, "give --models or --bundle, not both"),
        (["--models", "nothing"], 2, "nothing is not a folder"),
        (["--token-file", "nothing"], 2, "nothing"),
        (["--listen", "7860"], 2, "expected HOST:PORT"),
    ],
)
def test_options_that_cannot_work_are_a_sentence(options, status, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = run(*options)

    assert result.exit_code == status
    assert said in result.output


def test_what_has_to_be_installed_for_the_page_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "service.playground.launch", raising=False)
    package: ModuleType = sys.modules["service.playground"]
    monkeypatch.delattr(package, "launch", raising=False)

    result = run()

    assert result.exit_code == 1
    assert "uvicorn is not installed; the page needs train-export[playground]" in result.output


def test_nothing_else_of_the_service_imports_what_serves_the_page():
    program = (
        "import sys; from service import commands, server, aio_client; "
        "print([name for name in ('starlette', 'uvicorn', 'pipeline') if name in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert found.stdout.strip() == "[]", found.stderr
