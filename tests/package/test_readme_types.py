"""Every Python snippet of the READMEs type-checks in a user's project under `mypy --strict`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="install the extra test")

ROOT = Path(__file__).resolve().parents[2]
NAMES_OF_THE_TEXT = "import subprocess\nfrom collections.abc import Callable\n\nids = [1]\nother_ids = [2]\n\n"
FIXTURE = "def test_my_engine(assert_agrees: Callable[..., None]) -> None:"


def snippets() -> list[str]:
    pages = ["README.md", *(f"refengine/{room}/README.md" for room in ("engine", "validate", "worker"))]
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages]
    return [found for text in texts for found in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def checked(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """mypy on files of a project that has refengine as an installed package."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "mypy", *files],
        cwd=folder,
        env={"PATH": "", "HOME": str(folder), "MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.ci  # mypy takes a while
def test_snippets_type_check(tmp_path: Path) -> None:
    found = [snippet.replace("def test_my_engine(assert_agrees):", FIXTURE) for snippet in snippets()]
    assert found
    files = {f"snippet_{i}.py": NAMES_OF_THE_TEXT + snippet for i, snippet in enumerate(found)}
    wrong = "import refengine\n\nnumber: int = refengine.load().tokenizer.encode('a frog')\n"
    done = checked(tmp_path, {**files, "control.py": wrong})
    errors = [line for line in done.stdout.splitlines() if ": error:" in line and not line.startswith(str(ROOT))]
    ours = [line for line in errors if line.startswith(("snippet_", "control"))]
    assert [line.partition(":")[0] for line in ours] == ["control.py"], done.stdout + done.stderr
