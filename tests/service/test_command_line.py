"""What both programs have alike; `examples` and `check_help` are for the tests of either."""

import io
import os
import pty
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from service import command_line

WIDTH = 80
LISTED = 64  # characters of a first line, which the program's help lists in one
COLOUR = re.compile(rb"\x1b\[[0-9;]*(?:3[0-7]|4[0-7]|9[0-7]|10[0-7])m")


def commands(app):
    """Return the commands that the help shows, by name."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return {name: one for name, one in group.commands.items() if not one.hidden}


def examples(command):
    """Return the examples of a command as a shell takes them, a list of words each."""
    block = command.epilog.partition("**Examples**")[2].replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line.strip()]
    return [shlex.split(re.split(r" (?:&&|>|<) ", line)[0]) for line in lines]


def check_help(app, name):
    """Check the help of every command: its first line, its examples, its width.

    Args:
        app: the program.
        name: as it is called.
    """
    for command, found in commands(app).items():
        asked = CliRunner(env={"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"})
        shown = asked.invoke(app, [command, "--help"], prog_name=name).stdout
        first = found.help.partition("\n\n")[0]

        assert len(first) <= LISTED, command
        assert first.endswith("."), command
        assert found.rich_help_panel, command
        assert max(map(len, shown.splitlines())) <= WIDTH, command
        assert "…" not in shown.replace("VALUE,…", "").replace("N,N,…", ""), command
        assert "Exit status: 0 " in shown, command
        assert len(examples(found)) > 0, command
        for program, called, *words in examples(found):
            assert (program, called) == (name, command)
            with found.make_context(command, words):  # as the real parser takes them
                pass


def on_terminal(*words, **environment):
    """Run a command whose output and errors go to a terminal; return its status and what it has."""
    terminal, side = pty.openpty()
    with subprocess.Popen(
        words, stdin=side, stdout=side, stderr=side, env=plain_environment(**environment)
    ) as process:
        os.close(side)
        said = b""
        while True:
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:  # Linux' word for an end that nobody writes to
                break
            if not piece:
                break
            said += piece
    os.close(terminal)
    return process.returncode, said


def plain_environment(**environment):
    """Return the environment without what asks for colours or against them."""
    known = {"NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "COLUMNS"}
    kept = {name: value for name, value in os.environ.items() if name not in known}
    return kept | {"TERM": "xterm-256color", **environment}


@pytest.fixture
def app():
    """A program with one command."""
    app = command_line.program("Try it.")

    def hello(name: str = "you", count: int = 1) -> None:
        """Greet somebody.

        So many
        times.

        Example: try hello --name a-name-that-is-rather-long-for-one-line
        --count 3 --name another-name-that-is-long

        Example: try hello
        """

    command_line.add(app, hello, group="Greet")
    command_line.add_completion(app, "try", group="Shell")
    return app


def test_a_docstring_becomes_text_statuses_and_examples(app):
    hello = commands(app)["hello"]

    assert hello.help == "Greet somebody.\n\nSo many times."
    assert hello.rich_help_panel == "Greet"
    assert hello.epilog.startswith(command_line.USUAL)
    assert hello.epilog.endswith(
        "    try hello --name a-name-that-is-rather-long-for-one-line --count 3 \\\n"
        "        --name another-name-that-is-long\n"
        "    try hello"
    )
    check_help(app, "try")


def test_the_help_lists_commands_in_groups_and_every_exit_status(app):
    shown = CliRunner(env={"NO_COLOR": "1"}).invoke(app, ["--help"]).stdout

    assert "─ Greet ─" in shown
    for status, text in command_line.STATUSES.items():
        assert re.search(rf"^ +{status} +{re.escape(text[:20])}", shown, re.MULTILINE)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_every_shell_is_printed(app, shell):
    printed = CliRunner().invoke(app, ["completion", shell], prog_name="try")

    assert printed.exit_code == 0
    assert f"_TRY_COMPLETE=complete_{shell}" in printed.stdout
    assert not printed.stdout.startswith("\n")  # zsh reads #compdef in the first line only


def test_a_shell_that_nobody_knows_is_status_2(app):
    assert CliRunner().invoke(app, ["completion", "tcsh"]).exit_code == 2


def test_models_and_versions_of_a_folder_are_found_the_newest_first(tmp_path):
    for path in ("b/1", "b/10", "b/2", "a/1", "c/none"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "manifest.json").touch()

    assert command_line.models(tmp_path) == ["a", "b"]
    assert command_line.versions(tmp_path, "b") == ["10", "2", "1"]
    assert command_line.models(tmp_path / "none") == command_line.versions(tmp_path, "none") == []
    assert command_line.beginning(["ab", "b"], "a") == ["ab"]


def test_what_is_completed_among_bundles_and_fixed_words(tmp_path):
    for path in ("b/1", "b/10", "a/1"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "manifest.json").touch()

    assert command_line.bundles(tmp_path) == ["a/1", "b/10", "b/1"]
    assert command_line.one_of("auto", "native", "grpcio")("n") == ["native"]


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [
        (0, "0 KiB"),
        (1023, "1 KiB"),
        (999 << 10, "999 KiB"),
        (1000 << 10, "1.0 MiB"),
        (99 << 20, "99.0 MiB"),
        (100 << 20, "100 MiB"),
        (3 << 29, "1.5 GiB"),
        (5000 << 40, "5,000 TiB"),
    ],
)
def test_a_size_has_binary_units_and_a_fraction_where_it_is_small(size_bytes, said):
    assert command_line.size(size_bytes) == said


def test_progress_is_nothing_where_there_is_no_terminal():
    with redirect_stderr(io.StringIO()) as said, command_line.progress("asking") as show:
        show(1, 2)

    assert said.getvalue() == ""


BAR = """
import logging
from service import command_line
logging.basicConfig(format="%(message)s")
with command_line.progress("asking") as show:
    show(1, 4)
    logging.warning("a line above")
    show(2)
    import time; time.sleep(0.3)
"""


def test_progress_is_shown_on_a_terminal_below_what_is_logged():
    status, said = on_terminal(sys.executable, "-c", BAR, COLUMNS="100")

    assert status == 0
    assert b"asking" in said
    assert b"50%" in said
    assert b"left" in said
    assert re.search(rb"(^|[\r\n]|K)a line above\r\n", said)


def test_progress_is_nothing_on_a_dumb_terminal():
    _, said = on_terminal(sys.executable, "-c", BAR, TERM="dumb")

    assert said == b"a line above\r\n"


COMMAND = (sys.executable, "-m", "service")


@pytest.mark.parametrize("words", [("--help",), ("alias", "../x", "champion")])
def test_colours_are_for_terminals_that_want_them(words):
    def piped(**environment):
        done = subprocess.run(
            [*COMMAND, *words], capture_output=True, env=plain_environment(**environment)
        )
        return done.stdout + done.stderr

    assert COLOUR.search(on_terminal(*COMMAND, *words)[1])
    assert not COLOUR.search(on_terminal(*COMMAND, *words, NO_COLOR="1")[1])
    assert b"\x1b" not in on_terminal(*COMMAND, *words, TERM="dumb")[1]
    assert b"\x1b" not in piped()
    assert COLOUR.search(piped(FORCE_COLOR="1"))


def complete(program, script, asked, folder):
    """Have a real bash load a program's script and complete some words, a line each."""
    function = f"_{program.replace('-', '_')}_completion"
    lines = [
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; "
        f'COMPREPLY=(); {function} {program}; echo "${{COMPREPLY[*]}}"'
        for words in asked
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join([script, f"complete -p {program}", *lines])],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=os.environ | {"PATH": path},
    )
    return done.stdout.splitlines()


def test_bash_completes_commands_models_versions_and_paths(tmp_path):
    from service.commands import app

    (tmp_path / "models" / "shirts" / "12").mkdir(parents=True)
    (tmp_path / "models" / "shirts" / "12" / "manifest.json").touch()
    script = CliRunner().invoke(app, ["completion", "bash"], prog_name="serve-export").stdout

    how, *found = complete(
        "serve-export",
        script,
        [
            ["serve-export", "he"],
            ["serve-export", "alias", ""],
            ["serve-export", "alias", "shirts", "champion", ""],
            ["serve-export", "predict", "mod"],
            ["serve-export", "serve", "--front", ""],
            ["serve-export", "serve", "--log-format", "j"],
            ["serve-export", "doctor", "--model-control", "e"],
            ["serve-export", "completion", "f"],
        ],
        tmp_path,
    )

    assert found == [
        "health", "shirts", "12", "", "auto native grpcio", "json", "explicit", "fish",
    ]  # fmt: skip
    assert "-o default" in how  # where we know nothing, bash completes paths
