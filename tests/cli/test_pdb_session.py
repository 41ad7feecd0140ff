"""A developer steps through the forward pass that the engine runs: scripted pdb sessions, as README describes them."""

import pytest

from tests.cli_runner import subprocess_cli

SESSION = """p Qcur.shape, il
next
p Kcur.shape
up
up
p type(self).__name__, [part.ids for part in parts]
continue
p Qcur.shape
continue
"""


@pytest.mark.parametrize("device", ["cpu", "host"])
def test_pdb_stops_in_the_model_file_at_every_step_of_the_engine(device: str) -> None:
    arguments = ["--break", "Qcur-1", "--max-tokens", "2", "--temperature", "0", "--no-chat", "--device", device]
    result = subprocess_cli("generate", "hello", *arguments, stdin=SESSION.encode())
    assert result.code == 0, result.err
    shown = (result.out + result.err).replace("\r", "")
    assert "((3, 4, 64), 1)" in shown  # the prompt
    assert "qwen2.py" in shown
    assert "-> ops.kv_append(kv.k[il], Kcur, batch.slots)" in shown  # `next` made K
    assert "(3, 2, 64)" in shown
    assert "('ArrayRunner', [[" in shown  # two frames up: the engine's step
    assert "(1, 4, 64)" in shown  # the second stop: the token that was drawn
    assert "2 generated" in shown
