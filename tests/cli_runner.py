"""The command line run from tests: in this process, or as a process of its own as a user runs it."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from refengine.cli.main import main
from tools.make_model import write_model

ROOT = Path(__file__).resolve().parents[1]
# Buffered as for a user: what is left in a buffer at the end is where broken output shows.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONIOENCODING": "utf-8"}


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, and nothing else."""
        assert self.code == 2, self.err
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("refengine: error: ")
        return line


def cli(*arguments: object) -> Result:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def subprocess_cli(*arguments: object, stdin: bytes = b"", **environment: str) -> Result:
    """Run it as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "refengine", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def write_qwen2(folder: Path) -> Path:
    """Byte-level vocabulary without BOS, and a chat template."""
    write_model(folder / "qwen2.gguf", "qwen2", "Q8_0", n_layer=2)
    return folder / "qwen2.gguf"


def write_llama(folder: Path) -> Path:
    """SentencePiece vocabulary with BOS; no chat template; F32."""
    write_model(folder / "llama.gguf", "llama", "F32", n_layer=1)
    return folder / "llama.gguf"


def write_no_vocab(folder: Path) -> Path:
    write_model(folder / "bare.gguf", "llama", "F32", n_layer=1, vocab="none", n_vocab=97)
    return folder / "bare.gguf"
