"""docs/tutorial.md as one reader follows it, block for block, in a fresh clone."""

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import blocks

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
# Not typed, since the fixture `reader` stands for them.
SET_UP = ("make setup\n", "source .venv/bin/activate\n")
BLOCK_S, TERMINAL_S, STOP_S = 600, 120, 60


class Reader:
    """Who types what a block says, in as many terminals as it takes."""

    def __init__(self, clone: Path, environment: dict[str, str], ports: list[int]) -> None:
        self._clone, self._ports = clone, ports
        self._environment = environment | {"SERVE_EXPORT_ADDRESS": f"127.0.0.1:{ports[0]}"}
        self._typed: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._status, self._output = 0, ""

    def type(self, block: blocks.Block) -> None:
        """Run a block of commands; one in another terminal stays there."""
        command = block.text
        for line in SET_UP:
            command = command.replace(line, "")
        command = command.replace("127.0.0.1:8001", f"127.0.0.1:{self._ports[0]}").replace(
            "serve-export playground",
            f"serve-export playground --listen 127.0.0.1:{self._ports[1]}",
        )
        log = self._clone.parent / f"terminal-{block.line}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-e", "-c", f"exec {command}" if block.terminal else command],
                cwd=self._clone,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if block.terminal:
            self._typed[block.terminal] = (process, log)
            return
        try:
            self._status = process.wait(BLOCK_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self._output = log.read_text()

    def check(self, command: blocks.Block, shown: blocks.Block) -> None:
        """Require that what a block shows is what its terminal has."""
        terminal = shown.terminal or command.terminal
        if terminal:
            self._await(terminal, shown)
            return
        lost = blocks.missing(shown.text, self._output)
        assert not lost, f"line {shown.line}: {lost!r} is shown, but there is\n{self._output}"

    def check_status(self, command: blocks.Block, fails: bool) -> None:
        if not command.terminal:
            assert (self._status != 0) == fails, f"line {command.line}:\n{self._output}"

    def _await(self, terminal: str, shown: blocks.Block) -> None:
        process, log = self._typed[terminal]
        until = time.monotonic() + TERMINAL_S
        while lost := blocks.missing(shown.text, log.read_text()):
            assert process.poll() is None, log.read_text()
            said = f"line {shown.line}: {lost!r} is shown, but there is\n{log.read_text()}"
            assert time.monotonic() < until, said
            time.sleep(0.2)
        for page in re.findall(r"http://127\.0\.0\.1:\d+", log.read_text()):
            with urllib.request.urlopen(page, timeout=TERMINAL_S) as answer:
                assert answer.status == 200

    def leave(self) -> None:
        """Press Ctrl-C in the other terminals; what runs there must end well."""
        for process, _ in self._typed.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        try:
            ended = {name: process.wait(STOP_S) for name, (process, _) in self._typed.items()}
        finally:
            for process, _ in self._typed.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        assert not any(ended.values()), ended


@pytest.fixture
def typing(clone, reader, free_ports) -> Iterator[Reader]:
    one = Reader(clone, reader, free_ports(2))
    yield one
    one.leave()


def steps() -> list[tuple[blocks.Block, list[blocks.Block]]]:
    """Return each block of commands with the blocks of what is then to be seen."""
    found: list[tuple[blocks.Block, list[blocks.Block]]] = []
    for block in blocks.read(TUTORIAL):
        if block.language == "sh":
            found.append((block, []))
        else:
            found[-1][1].append(block)
    return found


def test_every_block_is_commands_or_what_they_put_out():
    assert [one.line for one in blocks.read(TUTORIAL) if one.language not in {"sh", "text"}] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # trains twice; seven minutes were seen on a busy machine
def test_a_reader_of_the_tutorial_sees_what_it_shows_after_every_block(typing):
    for command, shown in steps():
        typing.type(command)
        for block in shown:
            typing.check(command, block)
        typing.check_status(command, fails=any("error: " in block.text for block in shown))
