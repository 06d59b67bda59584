"""Ask one server with this project's client and with tritonclient, both in one process.

Run in this project's environment, which lacks nothing but tritonclient's own files:
python -m tests.conformance.clients.one_process FOLDER SITE_PACKAGES FIRST SECOND
"""

import importlib
import sys
from pathlib import Path

import numpy as np


def main(folder: Path, *modules: str) -> None:
    for module in modules:  # the order of the imports is what is tried
        importlib.import_module(module)
    from service.client import Client
    from tests.conformance.clients import asked as strangers

    asked = strangers.read(folder)
    with Client(asked.address) as ours, asked.client() as theirs:
        for start in (0, 7):
            answer = ours.predict(asked.images[start:], model=strangers.MODEL)
            result = theirs.infer(strangers.MODEL, asked.inputs(start))
            asked.check(result, start)
            for name in ("logits", "probabilities"):
                np.testing.assert_array_equal(answer.outputs[name], result.as_numpy(name))
    sys.stdout.write("both were answered\n")


if __name__ == "__main__":
    sys.path.append(sys.argv[2])  # last, so that only what is missing comes from there
    main(Path(sys.argv[1]), *sys.argv[3:])
