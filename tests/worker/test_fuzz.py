"""Some hundred wrong and odd requests at a real worker; `python -m tools.fuzz_worker` sends ten thousand."""

import importlib.util
import random
from pathlib import Path

import pytest

from tools.fuzz_raw import MAKERS
from tools.fuzz_worker import fuzz

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
needs_schemathesis = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="needs schemathesis (extra `harness`)"
)

# `refengine serve` that loses a descriptor for each text it decodes, and after the third fails to encode any.
FAULTY = """
import os, sys
from refengine.cli import main as cli
from refengine.tokenizer.base import Tokenizer
encode, decode = Tokenizer.encode, Tokenizer.decode
lost = []
def forgetful(self, ids, **keywords):
    lost.append(os.open("/dev/null", os.O_RDONLY))
    return decode(self, ids, **keywords)
def faulty(self, text, **keywords):
    if len(lost) > 2:
        raise ZeroDivisionError(text)
    return encode(self, text, **keywords)
Tokenizer.encode, Tokenizer.decode = faulty, forgetful
sys.exit(cli.main())
"""


def test_garbage_leaves_the_worker_as_it_was() -> None:
    result = fuzz(200, seed=3, by_schema=0.0)
    assert result["findings"] == 0, result["first_findings"]
    assert sum(result["raw"].values()) == 200
    assert result["raw_statuses"]["400"] > 10
    assert result["raw_statuses"]["200"] > 5


@needs_schemathesis
def test_bodies_by_schema_leave_the_worker_as_it_was() -> None:
    result = fuzz(120, seed=4, by_schema=1.0)
    assert result["findings"] == 0, result["first_findings"]
    assert sum(result["schema"].values()) == 120
    taken = {key.split()[0] for key in result["schema"] if key.endswith(("valid 200", "valid 202"))}
    assert taken >= {"/execute", "/cancel", "/v1/chat/completions"}


@needs_schemathesis
def test_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.fuzz_worker.GIVEN_BACK_WITHIN_S", 1.0)
    result = fuzz(60, seed=5, by_schema=0.9, program=("-c", FAULTY))
    found = "\n".join(result["first_findings"])
    for what in ("500", "file descriptors that are not given back", "in the log", "the haiku is another one"):
        assert what in found


def test_the_same_seed_makes_the_same_garbage() -> None:
    for make in MAKERS:
        assert [make(random.Random(i)) for i in range(20)] == [make(random.Random(i)) for i in range(20)]
