import subprocess
import sys

BEGIN = """
import os, signal, sys, threading
from service import entry
sys.argv = ["serve-export", "--help"]
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
entry.main()
"""


def test_ctrl_c_while_it_imports_shows_no_traceback():
    ended = subprocess.run(
        [sys.executable, "-c", BEGIN], capture_output=True, text=True, check=False, timeout=120
    )

    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
