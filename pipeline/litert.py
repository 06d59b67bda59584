"""Answer images with one TFLite file, in a process of its own.

    python -m pipeline.litert MODEL.tflite IMAGES.npy ANSWERS.npz THREADS

A process apart because TFLite's runtime and TensorFlow bring the same native code in different
versions. Imports neither TensorFlow nor anything of this project.
"""

import sys
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

SIGNATURE = "serving_default"


def answer(model: Path, images: Path, answers: Path, threads: int) -> None:
    """Run a file's images in the batches they come in.

    Args:
        model: the .tflite file.
        images: .npz of uint8 arrays, one a batch, as `numpy.savez` names them by their place.
        answers: .npz to write: `logits` of all rows, and `seconds` of each batch.
        threads: of the interpreter.
    """
    interpreter = Interpreter(str(model), num_threads=threads)
    run = interpreter.get_signature_runner(SIGNATURE)
    logits, seconds = [], []
    with np.load(images, allow_pickle=False) as batches:
        for place in range(len(batches.files)):
            batch = batches[f"arr_{place}"]
            started_s = time.monotonic()
            logits.append(run(image=batch)["logits"])
            seconds.append(time.monotonic() - started_s)
    np.savez(answers, logits=np.concatenate(logits), seconds=np.array(seconds))


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
