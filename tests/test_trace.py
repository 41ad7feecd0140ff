"""The trace: record, watch, replace, and stopping in a real debugger at the line of the forward pass."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.api import load
from refengine.errors import TraceError
from refengine.model import Model
from refengine.models import BY_ARCHITECTURE
from refengine.trace import Trace, no_trace, tensor_name
from tests.cli_runner import ENVIRONMENT
from tests.model_files import float_bytes, read_floats, rewrite
from tools.make_model import write_model

ROOT = Path(__file__).resolve().parents[1]
IDS = [5, 260, 17, 99, 300, 41, 8]
N_LAYER = 2


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trace")
    result = {arch: folder / f"{arch}.gguf" for arch in BY_ARCHITECTURE}
    for arch, path in result.items():
        write_model(path, arch, "F32", n_layer=N_LAYER)
    return result


@pytest.fixture(scope="module")
def llama(paths: dict[str, Path]) -> Model:
    return load(paths["llama"])


def recorded(model: Model, pattern: str, **arguments: Any) -> dict[str, np.ndarray]:
    trace = Trace(pattern)
    model.forward(IDS, trace=trace, **arguments)
    return trace.result()


def test_no_trace_returns_the_same_object() -> None:
    x = np.zeros(3)
    assert no_trace("Qcur", 1, x) is x
    assert no_trace("Qcur", None, x, 0) is x


def test_a_trace_that_changes_nothing_returns_the_same_object() -> None:
    x = np.zeros(3)
    assert Trace(".", watch=True)("Qcur", 1, x) is x


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(("Qcur", 3, None), "Qcur-3"), (("Qcur", 0, 0), "Qcur-0#0"), (("result_norm", None, None), "result_norm")],
)
def test_tensor_name(parts: tuple[str, int | None, int | None], expected: str) -> None:
    assert tensor_name(*parts) == expected


# ---- record -------------------------------------------------------------------------------------------------------


def test_record_by_regular_expression(llama: Model) -> None:
    assert set(recorded(llama, r"^Qcur-1$")) == {"Qcur-1"}
    assert set(recorded(llama, r"^[QK]cur-0")) == {"Qcur-0", "Qcur-0#0", "Kcur-0", "Kcur-0#0"}
    assert set(recorded(llama, "result")) == {"result_norm", "result_output"}
    assert recorded(llama, "no such name") == {}


def test_occurrences_are_distinct_tensors(llama: Model) -> None:
    tensors = recorded(llama, r"^Qcur-0")
    n = len(IDS)
    cfg = llama.config
    assert tensors["Qcur-0#0"].shape == (n, cfg.n_embd_q)  # the product
    assert tensors["Qcur-0"].shape == (n, cfg.n_head, cfg.head_dim)  # after RoPE
    rotated, product = tensors["Qcur-0"], tensors["Qcur-0#0"].reshape(tensors["Qcur-0"].shape)
    np.testing.assert_array_equal(rotated[0], product[0])  # position 0 is not rotated
    assert not np.allclose(rotated[1:], product[1:])


def test_recorded_values_are_the_forward_pass(llama: Model) -> None:
    tensors = recorded(llama, "^(attn_out|ffn_inp|ffn_out|l_out|result_output|kq|kq_soft_max|kqv|kqv_out)(-0|$)")
    np.testing.assert_array_equal(tensors["l_out-0"], tensors["ffn_inp-0"] + tensors["ffn_out-0"])
    np.testing.assert_array_equal(tensors["result_output"], llama.forward(IDS))
    cfg, n = llama.config, len(IDS)
    assert tensors["kq-0"].shape == tensors["kq_soft_max-0"].shape == (cfg.n_head, n, n)
    assert tensors["kqv-0"].shape == (cfg.n_head, n, cfg.head_dim)
    np.testing.assert_array_equal(tensors["kqv-0"].transpose(1, 0, 2).reshape(n, -1), tensors["kqv_out-0"])


def test_recorded_tensors_are_copies() -> None:
    trace, x = Trace("."), np.zeros(3)
    trace("a", None, x)
    x[:] = 1
    assert not trace.result()["a"].any()


def test_chunks_are_joined_along_the_rows(llama: Model) -> None:
    whole = recorded(llama, "^(Qcur|ffn_out|result_output)")
    for chunk in (3, 1):
        joined = recorded(llama, "^(Qcur|ffn_out|result_output)", chunk=chunk)
        assert {n: x.shape for n, x in joined.items()} == {n: x.shape for n, x in whole.items()}
        for name, x in whole.items():
            # float32 sums in another order; 100 × 2^-24 of the largest value, rounded up.
            np.testing.assert_allclose(joined[name], x, rtol=0, atol=1e-5 * np.abs(x).max())


def test_tensors_inside_attention_stay_apart_by_call(llama: Model) -> None:
    # Two calls of three: their `kqv` have one shape, and are still not rows of one tensor.
    trace = Trace("^(kq|kqv|kq_soft_max)-0$")
    llama.forward(IDS[:6], trace=trace, chunk=3)
    cfg = llama.config
    expected: dict[str, tuple[int, ...]] = {}
    for call in (0, 1):
        expected |= {f"{name}-0@{call}": (cfg.n_head, 3, 3 * call + 3) for name in ("kq", "kq_soft_max")}
        expected[f"kqv-0@{call}"] = (cfg.n_head, 3, cfg.head_dim)
    assert {name: x.shape for name, x in trace.result().items()} == expected


def test_bad_filter_is_named() -> None:
    with pytest.raises(TraceError, match=r"'Qcur\(' is not a regular expression"):
        Trace("Qcur(")


# ---- watch --------------------------------------------------------------------------------------------------------

# Weight, and the first tensor in which a bad value in its row 5 shows, at element 5 of the first token's row.
FIRST_BAD = [
    ("llama", "blk.1.ffn_down.weight", "ffn_out-1"),
    ("llama", "blk.0.attn_k.weight", "Kcur-0#0"),
    ("qwen2", "blk.1.attn_v.weight", "Vcur-1#0"),
    ("qwen3", "blk.0.ffn_gate.weight", "ffn_gate-0"),
    ("phi3", "blk.1.attn_output.weight", "attn_out-1"),
    ("gpt2", "blk.0.ffn_up.weight", "ffn_up-0"),
    ("gpt-oss", "blk.1.attn_output.weight", "attn_out-1"),
    ("llama", "output.weight", "result_output"),
]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("arch", "weight", "tensor"), FIRST_BAD)
def test_watch_names_the_first_bad_tensor(
    paths: dict[str, Path], tmp_path: Path, arch: str, weight: str, tensor: str, bad: float
) -> None:
    values = read_floats(paths[arch], weight)
    values[5, 3] = bad
    planted = {weight: (values.shape, 0, float_bytes(values))}
    model = load(rewrite(paths[arch], tmp_path / "bad.gguf", tensors=planted))
    with pytest.raises(TraceError, match="is the first with a non-finite value") as caught:
        model.forward(IDS, trace=Trace(watch=True))
    message = str(caught.value)
    assert re.search(r"(nan|-?inf) at \(0, 5\) of shape \(7, \d+\) \(7 in total\)", message), message
    assert f"tensor {tensor} is" in message
    assert load(paths[arch]).forward(IDS, trace=Trace(watch=True)).shape[0] == 7, "control: a sound model passes"


def test_watch_sees_every_tensor_before_the_next_is_made(paths: dict[str, Path], tmp_path: Path) -> None:
    embedding = read_floats(paths["gpt2"], "token_embd.weight")
    embedding[IDS[2], 11] = np.nan
    planted = {"token_embd.weight": (embedding.shape, 0, float_bytes(embedding))}
    model = load(rewrite(paths["gpt2"], tmp_path / "bad.gguf", tensors=planted))
    trace = Trace(watch=True)
    with pytest.raises(TraceError, match=r"tensor embd is .* nan at \(2, 11\) of shape \(7, 96\) \(1 in total\)"):
        model.forward(IDS, trace=trace)
    assert list(trace.seen) == ["embd"]


# ---- replace ------------------------------------------------------------------------------------------------------


def test_replacement_takes_the_tensors_place(llama: Model) -> None:
    plain = llama.forward(IDS)
    own = recorded(llama, "^l_out-0$")["l_out-0"]
    same = llama.forward(IDS, trace=Trace(replace={"l_out-0": own}))
    np.testing.assert_array_equal(same, plain)
    doubled = llama.forward(IDS, trace=Trace(replace={"l_out-0": lambda x: 2 * x}))
    by_array = llama.forward(IDS, trace=Trace(replace={"l_out-0": 2 * own}))
    np.testing.assert_array_equal(doubled, by_array)
    assert np.abs(doubled - plain).max() > 0.1, "control: the replacement is used"


def test_replacement_inside_attention_is_used(llama: Model) -> None:
    zero = Trace("^kqv_out-1$", replace={"kqv-1": np.zeros_like})
    llama.forward(IDS, trace=zero)
    assert not zero.result()["kqv_out-1"].any()


def test_replacement_keeps_the_tensors_type(llama: Model) -> None:
    own = recorded(llama, "^l_out-0$")["l_out-0"].astype(np.float64)
    trace = Trace("^attn_norm-1$", replace={"l_out-0": own})
    assert llama.forward(IDS, trace=trace).dtype == np.float32
    assert trace.result()["attn_norm-1"].dtype == np.float32


def test_replacement_of_another_shape_is_refused(llama: Model) -> None:
    with pytest.raises(TraceError, match=r"l_out-0 has shape \(3, 96\), the tensor has \(7, 96\)"):
        llama.forward(IDS, trace=Trace(replace={"l_out-0": np.zeros((3, 96), np.float32)}))


def test_recording_shows_what_was_computed_not_what_replaced_it(llama: Model) -> None:
    plain = recorded(llama, "^Qcur-0$")["Qcur-0"]
    trace = Trace("^Qcur-0$", replace={"Qcur-0": lambda x: x + 1})
    llama.forward(IDS, trace=trace)
    np.testing.assert_array_equal(trace.result()["Qcur-0"], plain)


# ---- break --------------------------------------------------------------------------------------------------------


def test_on_break_is_called_with_name_and_value(llama: Model) -> None:
    stops: list[tuple[str, tuple[int, ...]]] = []
    trace = Trace(breakpoints=["Kcur-1#0"], on_break=lambda name, x: stops.append((name, x.shape)))
    trace.breakpoint("Qcur-0")
    llama.forward(IDS, trace=trace, chunk=4)
    cfg = llama.config
    per_call = [[("Qcur-0", (n, cfg.n_head, cfg.head_dim)), ("Kcur-1#0", (n, cfg.n_embd_kv))] for n in (4, 3)]
    assert stops == per_call[0] + per_call[1]
    trace.check_names()


def test_on_break_sees_the_replaced_value(llama: Model) -> None:
    seen: list[float] = []
    trace = Trace(
        breakpoints=["Vcur-0"], on_break=lambda _, x: seen.append(float(x.max())), replace={"Vcur-0": np.zeros_like}
    )
    llama.forward(IDS, trace=trace)
    assert seen == [0.0]


def test_unknown_names_are_reported_with_the_known_ones(llama: Model) -> None:
    trace = Trace(breakpoints=["Qcur-7", "Qcur-0"], on_break=lambda *_: None, replace={"nonsense": np.zeros(1)})
    with pytest.raises(TraceError, match=r"no such tensor: Qcur-7, nonsense; this model has .*ffn_inp-0") as caught:
        llama.forward(IDS, trace=trace)
    assert "ffn_inp-1" not in str(caught.value), "one layer's names are enough"


def test_names_of_a_run_that_never_happened() -> None:
    with pytest.raises(TraceError, match="no forward pass was run"):
        Trace(breakpoints=["Qcur-0"]).check_names()


def debug(path: Path, breakpoints: list[str], commands: list[str], output: Path) -> subprocess.CompletedProcess[str]:
    """`refengine logits --break …` with these commands typed into the debugger."""
    return subprocess.run(
        [sys.executable, "-m", "refengine", "logits", "--model", str(path), "--ids", ",".join(map(str, IDS))]
        + ["--output", str(output)]
        + [f"--break={name}" for name in breakpoints],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arch", BY_ARCHITECTURE)
def test_debugger_stops_in_the_model_file_with_the_tensor_in_reach(
    paths: dict[str, Path], tmp_path: Path, arch: str
) -> None:
    model = load(paths[arch])
    cfg, n = model.config, len(IDS)
    show = 'p "shape", {}.shape'
    run = debug(
        paths[arch],
        ["Qcur-1", "kq-1", "l_out-1", "result_output"],
        [
            *(show.format("Qcur"), "p 'il', il, 'Kcur' in locals()", "c"),
            *(show.format("kq"), "up", "up", "p 'il', il", "c"),
            *(show.format("l_out"), "c"),
            *(show.format("__return__"), "c"),
        ],
        tmp_path / "out.npz",
    )
    assert run.returncode == 0, run.stderr
    file = arch.replace("-", "_")
    stops = re.findall(r"> (\S+\.py)\((\d+)\)(\w+)\(\)", run.stdout)
    shapes = re.findall(r"\('shape', (\(.*?\))\)", run.stdout)
    expected = [(n, cfg.n_head, cfg.head_dim), (cfg.n_head, n, n), (n, cfg.n_embd), (n, cfg.n_vocab)]
    assert shapes == [str(shape) for shape in expected]
    # `up` shows two more frames after the second stop.
    where = [Path(name).name for name, _, _ in stops]
    assert where == [f"{file}.py", "attention.py", "__init__.py", f"{file}.py", f"{file}.py", f"{file}.py"]
    # It stands on the line after the one that set the variable; at the return, on that line itself.
    set_before = ['Qcur = trace("Qcur", il,', 'kq = probe("kq"', 'l_out = trace("l_out"']
    for (name, line, _), text in zip([stops[0], stops[1], stops[4]], set_before, strict=True):
        before = [s for s in Path(name).read_text(encoding="utf-8").splitlines()[: int(line) - 1] if s.strip()]
        assert before[-1].strip().startswith(text)
    assert 'trace("result_output"' in Path(stops[5][0]).read_text(encoding="utf-8").splitlines()[int(stops[5][1]) - 1]
    assert "('il', 1)" in run.stdout
    assert [line.split(",")[0] for line in run.stderr.splitlines() if "stopped after" in line] == [
        f"refengine: stopped after {name}" for name in ("Qcur-1", "kq-1", "l_out-1", "result_output")
    ]
    assert (tmp_path / "out.npz").exists(), "after `c` the command goes on to its end"


def test_debugger_can_change_the_tensor(paths: dict[str, Path], tmp_path: Path) -> None:
    run = debug(paths["llama"], ["l_out-1"], ["l_out[:] = 0", "c"], tmp_path / "out.npz")
    assert run.returncode == 0, run.stderr
    assert not np.load(tmp_path / "out.npz")["logits"].any()


@pytest.mark.parametrize("commands", [["q"], []])
def test_leaving_the_debugger_is_an_interruption(paths: dict[str, Path], tmp_path: Path, commands: list[str]) -> None:
    run = debug(paths["llama"], ["Qcur-0"], commands, tmp_path / "out.npz")
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == "refengine: stopped in the debugger"
    assert list(tmp_path.iterdir()) == []


def test_unknown_breakpoint_is_an_error_after_the_run(paths: dict[str, Path], tmp_path: Path) -> None:
    run = debug(paths["llama"], ["Qcur-9"], [], tmp_path / "out.npz")
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("refengine: error: no such tensor: Qcur-9; this model has ")
    assert list(tmp_path.iterdir()) == []
