"""A model file that shrinks while a worker loads it: the start fails as any other, whatever the device reads it for."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cli_runner import ENVIRONMENT, ROOT
from tests.worker.server import command, write_talker

# `refengine serve` whose model file is cut once the first of its tensors is loaded.
SHRINKING = """
import os, sys
from refengine.cli import main as cli
from refengine.worker import startup
path, load = sys.argv.pop(1), startup.load
def shrinking(*arguments, progress, **keywords):
    def cut(done, total):
        os.truncate(path, 4096)
        progress(done, total)
    return load(*arguments, progress=cut, **keywords)
startup.load = shrinking
sys.exit(cli.main())
"""


@pytest.mark.parametrize("device", ["cpu", "host"])
def test_start_fails_with_the_tensor_and_the_bytes(tmp_path: Path, device: str) -> None:
    path = write_talker(tmp_path)
    line, _ = command("--device", device, "--model", path, script=(SHRINKING, path))
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    error = json.loads(done.stderr.splitlines()[-1])
    assert (error["event"], error["code"]) == ("error", "MODEL_LOAD_FAILED")
    assert f"{path}: the file has shrunk while it was read: tensor 'blk.0." in error["message"]
    assert "has 0 bytes, expected " in error["message"]
