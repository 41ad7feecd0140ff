"""The lock that keeps other GPU tests away from one that compares the driver's memory."""

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.cli_runner import ROOT
from tests.conftest import gpu_lock

HOLDER = """
import fcntl, pathlib, sys
from tests.conftest import gpu_lock
with gpu_lock(getattr(fcntl, sys.argv[1]), pathlib.Path(sys.argv[2])):
    print("held", flush=True)
"""


def holds_within(how: str, folder: Path, seconds: float) -> bool:
    """Whether another process gets the lock while this one holds it."""
    line = [sys.executable, "-c", HOLDER, how, str(folder)]
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.TimeoutExpired:
        return False
    return done.stdout == "held\n"


def test_shared_holders_run_together_and_an_exclusive_one_alone(tmp_path: Path) -> None:
    with gpu_lock(fcntl.LOCK_SH, tmp_path):
        assert holds_within("LOCK_SH", tmp_path, 60)
        assert not holds_within("LOCK_EX", tmp_path, 5)
    with gpu_lock(fcntl.LOCK_EX, tmp_path):
        assert not holds_within("LOCK_SH", tmp_path, 5)
    assert holds_within("LOCK_EX", tmp_path, 60)
