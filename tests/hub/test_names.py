"""Names of models on the hub: what is meant by one, and which file of a repository it is."""

from pathlib import Path

import pytest

from refengine.errors import HubError
from refengine.hub.files import resolve
from refengine.hub.names import RepoFile, choose, parse
from tests.cli_runner import cli

MIB = 2**20


def chosen(name: str, *files: str) -> list[str]:
    reference = parse(name)
    assert reference is not None
    return [file.name for file in choose(reference, [RepoFile(f, MIB) for f in files])]


MANY = [f"m-{quant}.gguf" for quant in ("Q4_K_M", "Q4_K_S", "Q4_K", "IQ4_XS", "Q8_0", "F16", "BF16", "UD-Q4_K_XL")]
CASES = [
    ("hf:me/m", ["model.gguf", "README.md", "mmproj-F16.gguf"], "model.gguf"),
    ("hf:me/m", ["model-F16.gguf", "model.imatrix.gguf", "imatrix.gguf", "lora-F16.gguf"], "model-F16.gguf"),
    ("hf:me/m", MANY, "m-Q4_K_M.gguf"),
    ("hf:me/m:q4_k_m", MANY, "m-Q4_K_M.gguf"),
    ("hf:me/m:Q4_K", MANY, "m-Q4_K.gguf"),
    ("hf:me/m:F16", [*MANY, "mmproj-F16.gguf", "sub/mmproj-m-F16.gguf"], "m-F16.gguf"),
    ("hf:me/m:bf16", MANY, "m-BF16.gguf"),
    ("hf:me/m:UD-Q4_K_XL", MANY, "m-UD-Q4_K_XL.gguf"),
    ("hf:me/m:q4_k_xl", MANY, "m-UD-Q4_K_XL.gguf"),
    ("hf:me/m:Q8_0", ["m_q8_0.gguf", "m_q4_0.gguf"], "m_q8_0.gguf"),
    ("hf:me/m:Q4_K_M", ["m-imatrix-Q4_K_M.gguf", "m-Q8_0.gguf"], "m-imatrix-Q4_K_M.gguf"),
    ("hf:me/m:it", ["m-it-F16.gguf", "m-pt-F16.gguf"], "m-it-F16.gguf"),
    ("hf:me/m:mmproj-F16.gguf", ["m-F16.gguf", "mmproj-F16.gguf"], "mmproj-F16.gguf"),
    ("hf:me/m:a/m.gguf", ["a/m.gguf", "b/m.gguf"], "a/m.gguf"),
    ("hf:me/m:x.gguf", ["a/x.gguf", "b/m.gguf"], "a/x.gguf"),
    ("hf:me/m:x.gguf", ["x.gguf", "a/x.gguf"], "x.gguf"),
]


@pytest.mark.parametrize(("name", "files", "expected"), CASES)
def test_choice(name: str, files: list[str], expected: str) -> None:
    assert chosen(name, *files) == [expected]
    assert chosen(name, *reversed(files)) == [expected]


def test_choice_of_a_split_model_is_all_its_parts() -> None:
    parts = [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    files = [*reversed(parts), "m-Q4_0.gguf"]
    assert chosen("hf:me/m:Q8_0", *files) == parts
    assert chosen("hf:me/m:m-Q8_0-00002-of-00003.gguf", *files) == parts
    assert chosen("hf:me/m", *parts) == parts
    with pytest.raises(HubError, match=r"only 2 of the 3 parts of Q8_0/m-Q8_0-00001-of-00003\.gguf exist"):
        chosen("hf:me/m:Q8_0", *parts[:2])


REFUSED = [
    ("hf:me/m:Q5_K_M", MANY, r"no model has Q5_K_M in the name; there is m-BF16\.gguf \(1\.00 MiB\), m-F16"),
    ("hf:me/m:K_M", MANY, "no model has K_M"),
    ("hf:me/m:4_K_M", MANY, "no model has 4_K_M"),
    ("hf:me/m:.", MANY, r"no model has \. in"),
    ("hf:me/m:x.gguf", MANY, "no file has this name; there is m-BF16"),
    ("hf:me/m:m.gguf", ["a/m.gguf", "b/m.gguf"], r"several files have this name; there is a/m\.gguf \(1\.00 MiB\), b"),
    ("hf:me/m:Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf", "c-F16.gguf"], r"several .* there is a-Q8_0[^c]*b-Q8_0[^c]*$"),
    ("hf:me/m", ["a-Q8_0.gguf", "b-F16.gguf"], "several models, and not exactly one is Q4_K_M: name one after a colon"),
    ("hf:me/m", ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "c.gguf"], "not exactly one is Q4_K_M.*a-Q4_K_M"),
    ("hf:me/m", ["model.safetensors", "mmproj-F16.gguf"], "no GGUF model; choose a repo"),
    ("hf:me/m:F16", ["mmproj-F16.gguf"], "no model has F16 in the name; there is no GGUF model"),
    ("hf:me/m:Q8_0", [f"m{i}-F16.gguf" for i in range(60)], "and 20 more$"),
]


@pytest.mark.parametrize(("name", "files", "words"), REFUSED)
def test_choice_that_is_not_clear(name: str, files: list[str], words: str) -> None:
    with pytest.raises(HubError, match=words):
        chosen(name, *files)


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:me",
        "hf:me/",
        "hf:me/m:",
        "hf:me/m@",
        "hf:a/b/c",
        "hf://me/m",
        "hf:me/../m",
        "hf:me/m@../../x",
        "hf:m e/m",
    ],
)
def test_name_that_is_malformed(name: str, tmp_path: Path) -> None:
    assert "write hf:OWNER/REPO[@REVISION]" in cli("inspect", "--model", name).error
    serve = cli(
        "serve",
        "--worker-id",
        "12345678-1234-1234-1234-123456789abc",
        "--port",
        "8123",
        "--device",
        "cpu",
        "--model",
        name,
    )
    assert "write hf:OWNER/REPO[@REVISION]" in serve.error


def test_paths_stay_paths() -> None:
    assert resolve("a/b:c.gguf") == Path("a/b:c.gguf")
    assert resolve(Path("hf:me/m")) == Path("hf:me/m")
    reference = parse("hf:me/m-1.5@refs/pr/3:sub/x:y.gguf")
    assert reference is not None
    assert (reference.repo, reference.revision, reference.choice) == ("me/m-1.5", "refs/pr/3", "sub/x:y.gguf")
