"""Every kernel compiles for every architecture, without a GPU, and takes of it what golden/kernels.json says."""

import json
from pathlib import Path

import pytest

from refengine.cuda.runtime import compile
from refengine.cuda.runtime.compile import compile_files
from refengine.cuda.runtime.nvrtc import ARCHITECTURES, compile_source, nvrtc_version
from refengine.cuda.runtime.source import names, read_source, source_of
from refengine.errors import DeviceError, KernelError
from tests.cli_runner import cli
from tools.make_model import TINY, write_spec
from tools.report_kernels import FIELDS, RECORD

# A spill costs memory traffic in the inner loop. None is accepted without a reason here.
SPILLS: dict[str, str] = {}  # kernel → reason


@pytest.fixture(scope="module", autouse=True)
def needs_nvrtc() -> None:
    try:
        nvrtc_version()
    except DeviceError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", names())
def test_it_compiles_without_spills_and_takes_what_is_recorded(name: str, arch: str) -> None:
    source = read_source(name)
    compiled = compile_source(source, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert set(compiled.resources) == set(source.kernels)
    spilled = {kernel for kernel, r in compiled.resources.items() if r.spilled}
    assert spilled <= SPILLS.keys()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["nvrtc"] != nvrtc_version():
        pytest.skip(f"recorded with NVRTC {record['nvrtc']}, this is {nvrtc_version()}")
    found = {kernel: [getattr(r, field) for field in FIELDS] for kernel, r in compiled.resources.items()}
    recorded = {kernel: record["kernels"].get(kernel, {}).get(arch) for kernel in found}
    assert found == recorded, "python -m tools.report_kernels --write records the change"


def test_the_record_has_no_kernel_that_is_gone() -> None:
    there = {kernel for name in names() for kernel in read_source(name).kernels}
    assert set(json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]) == there


def test_a_compile_error_has_file_and_line_and_an_unknown_architecture_is_named() -> None:
    wrong = '// one\nextern "C" __global__ void k(int n) { x = n; }'
    with pytest.raises(KernelError, match=r"broken\.cu\(2\): error"):
        compile_source(source_of("broken", ("head.cuh", "// head\n"), ("broken.cu", wrong)), "sm_80")
    with pytest.raises(DeviceError, match="does not support sm_11"):
        compile_source(source_of("fine", ("fine.cu", "")), "sm_11")


def test_files_are_compiled_ahead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compile, "names", lambda: ["activation", "rope"])
    told: list[tuple[int, int]] = []
    files = compile.missing("sm_80")
    assert sorted(files) == [("activation", ()), ("rope", ())]
    compile_files("sm_80", files, lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert len(list(tmp_path.glob("*-sm_80-*.cubin"))) == 2
    assert compile.missing("sm_80") == []
    with pytest.raises(KernelError, match=r"was not compiled for sm_10 .*NVRTC"):
        compile_files("sm_10", files)


def test_kernels_of_a_model_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "tiny.gguf"
    write_spec(model, TINY["qwen2-q4_k_m"])
    line = ("compile", "--arch", "sm_90a", "--file", "rope", "--model", str(model), "--max-batch", "1")
    done = cli(*line, "--multiprocessors", "132")
    assert done.code == 0
    made = {path.name.split("-")[0] for path in (tmp_path / "cache").glob("*-sm_90a-*.cubin")}
    assert made == {"rope", "one_row", "attention_step"}
    assert "0 kernel files compiled" in cli(*line, "--multiprocessors", "132").err
    assert "0 kernel files compiled" not in cli(*line, "--multiprocessors", "20").err
    assert "give its number of --multiprocessors" in cli(*line).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--arch", "ampere"), "--arch: given 'ampere'"),
        (("--arch", "sm_80", "--jobs", "0"), "--jobs: given 0"),
        (("--arch", "sm_80", "--max-batch", "0"), "--max-batch: given 0"),
        (("--arch", "sm_75", "--model", "m.gguf", "--multiprocessors", "40"), "--model: given with --arch sm_75"),
    ],
)
def test_compile_refuses_what_it_does_not_know(arguments: tuple[str, ...], said: str) -> None:
    done = cli("compile", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_cache_that_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be stored in" in cli("compile", "--arch", "sm_80").error
