import json
import subprocess
import sys
from typing import Any

import numpy as np

from pipeline.answering import lite


def test_a_question_that_the_runtime_refuses_is_answered_why(tmp_path):
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    question = {"file": 0, "dtype": "uint8", "rows": [[1]]}

    said = lite.answer(question, [tmp_path / "broken.tflite"], {})

    assert said["error"]


def test_a_file_is_opened_once_and_its_outputs_are_lists(tmp_path):
    class Opened:
        def run(self, rows):
            return {"logits": rows.astype(np.float32) * 2}

    question = {"file": 3, "dtype": "uint8", "rows": [[1, 2]]}

    opened: dict[int, Any] = {3: Opened()}

    assert lite.answer(question, [], opened) == {"outputs": {"logits": [[2.0, 4.0]]}}


def test_the_process_ends_with_its_input(tmp_path):
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    question = json.dumps({"file": 0, "dtype": "uint8", "rows": [[1]]})

    done = subprocess.run(
        [sys.executable, "-m", "pipeline.answering.lite", str(tmp_path / "broken.tflite")],
        input=f"{question}\n", capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0
    assert "error" in json.loads(done.stdout)
