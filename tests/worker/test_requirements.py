"""requirements.yaml is complete and true: every id has a test, and every test is there."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

TESTS = Path(__file__).resolve().parents[1]
TABLE: dict[str, dict[str, Any]] = yaml.safe_load((TESTS / "worker" / "requirements.yaml").read_text(encoding="utf-8"))


def names_of(file: str) -> set[str]:
    """The test functions of a test file."""
    path = TESTS / file
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def problems(table: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    for name, entry in table.items():
        if not re.fullmatch(r"W-\d{4}", name) or not entry or set(entry) != {"tests"} or not entry["tests"]:
            found.append(f"{name}: expected an id W-nnnn with tests")
            continue
        for test in entry["tests"]:
            file, _, function = test.partition("::")
            if not function.startswith("test_") or function not in names_of(file):
                found.append(f"{name}: there is no {test}")
    return found


def test_every_requirement_has_a_test() -> None:
    assert len(TABLE) > 40
    assert problems(TABLE) == []


def test_a_wrong_table_is_caught() -> None:
    assert problems({"W-1": {"tests": []}})
    assert problems({"W-1001": {}})
    assert problems({"W-1001": {"tests": []}})
    assert problems({"W-1001": {"tests": ["worker/test_http.py::test_that_is_not_there"]}})
    assert problems({"W-1001": {"tests": ["test_nothing.py::test_health"]}})


def test_the_table_has_every_id_of_the_specification(shared_data: Path) -> None:
    specification = shared_data / "spec" / "worker.md"
    if not specification.is_file():
        pytest.skip(f"no {specification}")
    assert set(re.findall(r"W-\d{4}", specification.read_text(encoding="utf-8"))) == set(TABLE)
