import subprocess
import sys

BEGIN = """
import os, signal, sys
from pipeline import entry
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "pipeline.__main__":
            os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["train-export", "--help"]
sys.meta_path.insert(0, Interrupting())
entry.main()
"""


def test_ctrl_c_while_it_imports_shows_no_traceback():
    ended = subprocess.run(
        [sys.executable, "-c", BEGIN], capture_output=True, text=True, check=False, timeout=120
    )

    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
