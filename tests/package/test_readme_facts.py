"""What the README lists is what there is."""

import re
from pathlib import Path

from refengine.models import BY_ARCHITECTURE
from refengine.quants import SUPPORTED

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def row(name: str) -> str:
    (found,) = re.findall(rf"^\| {name} \| (.*) \|$", README, re.MULTILINE)
    return str(found)


def test_readme_lists_the_architectures_and_tensor_types() -> None:
    assert re.findall(r"`([^`]+)`", row("architectures")) == list(BY_ARCHITECTURE)
    types = re.findall(r"\b[A-Z]+[0-9]+[_0-9A-Z]*\b", row("tensor types"))
    assert sorted(types) == sorted(kind.name for kind in SUPPORTED.values())
