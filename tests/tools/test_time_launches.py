"""tools/time_launches.py: it launches what a prompt launches, without a GPU."""

import re

import pytest

pytest.importorskip("cupy", reason="CuPy is not installed (extra `nvrtc`)")

from tools import time_launches


def test_it_counts_the_launches_and_times_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert time_launches.main(["--model", "llama-q4_0", "--layers", "2", "--tokens", "20", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    # The embedding, fourteen launches a layer, the wanted row, its norm and the head.
    assert re.match(r"llama-q4_0, 2 layers, 20 tokens: 32 launches, \d+\.\d+ ms, \d+\.\d+ µs a launch; ", said), said
