import asyncio
import os
import sys
from contextlib import aclosing

import numpy as np
import pytest

from service.playground import variants
from service.playground.errors import PlaygroundError
from service.playground.variants import Said, Variants

ROW = np.array([[[10], [20]], [[30], [40]]], np.uint8)
LOGITS = (102.0, -102.0, -5.0)


async def ask(others, path, row=ROW):
    async with aclosing(others.ask(path, row)) as answers:
        return [one async for one in answers]


def number_of(others):
    """Return the ids of the processes."""
    return [running._process.pid for running in others._running.values()]


def test_every_variant_answers_a_row(command, tmp_path):
    async def main():
        others = Variants(command)
        try:
            return await ask(others, tmp_path)
        finally:
            await others.close()

    names, *said = asyncio.run(main())

    assert names == ("saved-model", "onnx-float32", "onnx-int8")
    assert said[:2] == [Said(name, LOGITS, 0.002) for name in names[:2]]
    assert said[2].outputs == (102.0, -101.75, -5.0)


def test_a_process_is_kept_for_the_next_row_and_ends_with_the_last(command, tmp_path):
    async def main():
        others = Variants(command)
        folders = [tmp_path / name for name in "aaba"]
        for folder in folders:
            await ask(others, folder)
        kept = number_of(others)
        await ask(others, tmp_path / "c")  # the third takes the place of the one used least
        left = number_of(others)
        await others.close()
        return kept, left

    kept, left = asyncio.run(main())

    assert len(kept) == 2
    assert left[0] == kept[1]
    for process in {*kept, *left}:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_one_variant_cannot_answer_is_said_for_it_alone(command, tmp_path):
    async def main():
        others = Variants(command)
        try:
            return await ask(others, tmp_path, np.full((2, 2, 1), 77, np.uint8))
        finally:
            await others.close()

    _, *said = asyncio.run(main())

    assert [one.error for one in said] == ["", "", "it overflowed"]


def test_a_crash_is_a_sentence_and_the_next_row_starts_the_process_again(command, tmp_path):
    async def main():
        others = Variants(command)
        try:
            with pytest.raises(
                PlaygroundError, match="status 1: no memory is left; the next image"
            ):
                await ask(others, tmp_path, np.full((2, 2, 1), 66, np.uint8))
            return await ask(others, tmp_path)
        finally:
            await others.close()

    assert len(asyncio.run(main())) == 4


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('error: it is not whole')", "status 1: it is not whole"),
        ("print('hello', flush=True); input()", "it wrote what is no answer"),
        ("import os; os.kill(os.getpid(), 9)", "status -9: it gave no reason"),
    ],
)
def test_a_process_that_does_not_begin_is_a_sentence(tmp_path, program, said):
    async def main():
        others = Variants((sys.executable, "-c", program))
        try:
            await ask(others, tmp_path)
        finally:
            await others.close()

    with pytest.raises(PlaygroundError, match=said):
        asyncio.run(main())


def test_a_command_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(PlaygroundError, match="the variants cannot answer"):
        asyncio.run(ask(Variants((str(tmp_path / "nothing"),)), tmp_path))


def test_a_process_that_does_not_stop_when_it_is_asked_to_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "STOP_S", 0.1)
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('{\"variants\": []}', flush=True); time.sleep(600)"
    )

    async def main():
        others = Variants((sys.executable, "-c", program))
        await ask(others, tmp_path)
        (process,) = number_of(others)
        await others.close()
        return process

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(main()), 0)


def test_what_has_to_be_installed_is_said(monkeypatch):
    assert variants.missing() == ""

    monkeypatch.setattr(variants, "NEEDED", ("tensorflow", "no_such_package"))

    assert variants.missing().startswith(
        "the package no_such_package is not installed beside the playground"
    )


def test_the_real_process_answers_for_a_bundle(make_bundle):
    async def main():
        others = Variants()
        try:
            return await ask(others, make_bundle())
        finally:
            await others.close()

    names, said = asyncio.run(main())

    assert names == ("onnx-float32",)
    assert said.outputs == LOGITS
