"""Run one target under atheris: python -m tests.fuzz.guided TARGET BUNDLE [libFuzzer's options].

TARGET is a module beside this one with three functions:

- `running(bundle)` yields what is called with each input; it raises where a promise is broken
- `seeds(bundle)` returns inputs that the fuzzer starts from, beside its corpus
- `change(content, rng, some)` returns an input like `content`; `some` changes bytes in it
"""

import importlib
import random
import sys
from pathlib import Path

import atheris

# Whose branches guide the fuzzer, beside the service's own: what reads the input for it.
READERS = {
    "request": ["PIL"],
    "manifest": ["google.protobuf.json_format"],
    "model": [],
    "golden": ["numpy.lib._npyio_impl", "numpy.lib._format_impl", "zipfile"],
}
BLIND = 0.2  # of the inputs are changed without regard to their structure
ROOM = 64  # most bytes that one blind change adds


def main() -> None:
    """Fuzz until libFuzzer's options say stop, or an input breaks a promise."""
    name, bundle, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["service", *READERS[name]]):
        target = importlib.import_module(f"tests.fuzz.fuzz_{name}")

    def some(content: bytes) -> bytes:
        return atheris.Mutate(content, len(content) + ROOM)

    def change(content: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = content if rng.random() < BLIND else target.change(content, rng, some)
        return atheris.Mutate(content, max_size) if changed is content else changed[:max_size]

    with target.running(Path(bundle)) as one:
        atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
