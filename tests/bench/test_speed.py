"""`refengine bench speed`: the real command on a small model, and the arithmetic of its output. No time is judged."""

import copy
import json
import os
import re
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refengine.bench.speed.baseline import against
from refengine.bench.speed.measure import Decode, Measurement, Prompt, Sample, Size, Spread, measure, ratios
from refengine.bench.speed.ours import Refengine
from refengine.bench.speed.process import EngineProcess, Refused, Setup, ending, last_words
from refengine.bench.speed.profile import tensor_kind
from refengine.bench.speed.report_html import to_html
from refengine.bench.speed.report_text import number
from refengine.bench.speed.run import Compared, Settings, Sizes, to_profile, why_not
from refengine.bench.speed.traffic import cache_bytes_read, copy_rates, free_memory, weight_bytes
from refengine.device import open_device
from refengine.errors import DeviceError, RefengineError
from refengine.gguf.file import GGUFFile
from refengine.models import read_config
from tests.chromium import chromium, texts
from tests.cli_runner import Result, cli
from tests.model_files import ModelFiles
from tools.gpu_check import last_record

TINY_SIZES = ("--prompts", "8,600", "--depths", "0,20", "--streams", "1,3", "--tokens", "3", "--rounds", "3")
Run = tuple[Result, dict[str, Any], str]  # what the command prints, its JSON and its page


@pytest.fixture(scope="module")
def run(tiny_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("speed")
    as_json, as_html = folder / "speed.json", folder / "speed.html"
    model = tiny_model("qwen2-q4_k_m")
    result = cli("bench", "speed", "--model", model, *TINY_SIZES, "--profile", "--json", as_json, "--html", as_html)
    assert result.code == 0, result.err
    return result, json.loads(as_json.read_text()), as_html.read_text()


def test_every_size_has_its_samples_and_their_figures(run: Run) -> None:
    _, record, _ = run
    (model,) = record["models"]
    assert [size["label"] for size in model["measurements"]] == [
        "prompt of 8 tokens",
        "decode, 1 stream at depth 0",
        "decode, 1 stream at depth 20",
        "decode, 3 streams at depth 0",
    ]
    copied = statistics.median(model["copy_bytes_per_s"]["samples"])
    for size in model["measurements"]:
        ours = size["engines"]["refengine"]
        samples = ours["samples"]
        assert len(samples) == 3
        expected = 8 if size["kind"] == "prompt" else 3 * size["streams"]
        assert {sample["tokens"] for sample in samples} == {expected}
        rates = [sample["tokens"] / sample["seconds"] for sample in samples]
        assert ours["tokens_per_s"]["median"] == pytest.approx(statistics.median(rates))
        assert (ours["tokens_per_s"]["lowest"], ours["tokens_per_s"]["highest"]) == (min(rates), max(rates))
        steps = 3 if size["kind"] == "decode" else 1
        milliseconds = statistics.median(1e3 * sample["seconds"] / steps for sample in samples)
        assert ours["milliseconds"]["median"] == pytest.approx(milliseconds)
        if size["kind"] == "decode":
            assert {sample["positions"] for sample in samples} == {max(size["depth"], 1) + 2}
            assert ours["bytes_per_s"] == pytest.approx(ours["bytes_per_step"] / (milliseconds / 1e3))
            assert ours["share_of_copy"] == pytest.approx(ours["bytes_per_s"] / copied)


def test_what_ran_is_in_the_record(run: Run) -> None:
    _, record, _ = run
    assert (record["schema"], record["schema_version"], record["device"]) == ("refengine-speed", 1, "cpu")
    assert {"date", "machine", "commit", "version", "command"} <= set(record)
    assert "cores" in record["machine"]
    assert record["settings"]["sizes"]["depths"] == [0, 20]
    ours = record["models"][0]["engines"]["refengine"]
    assert (ours["architecture"], ours["quant_kind"], ours["numerics"]) == ("qwen2", "Q4_K_M", "exact")
    assert {"load_s", "peak_rss_bytes", "idle_cpu_share", "n_ctx", "file_bytes"} <= set(ours)


def test_a_size_that_does_not_fit_is_left_out_and_said(run: Run) -> None:
    result, record, page = run
    reason = "prompt of 600 tokens: it needs 601 positions, and the model's context has 512"
    (left,) = record["models"][0]["left_out"]
    assert f"{left['label']}: {left['reason']}" == reason
    assert f"left out: {reason}" in result.out
    assert "prompt of 600 tokens: left out: it needs 601 positions" in result.err
    assert "it needs 601 positions" in page


def test_the_tables(run: Run) -> None:
    result, record, _ = run
    for size in record["models"][0]["measurements"]:
        (row,) = [line for line in result.out.splitlines() if line.startswith(f"│ {size['label']} ")]
        assert f" {number(size['engines']['refengine']['tokens_per_s']['median'])} (" in row
    assert "A step by operation, decode, 1 stream at depth 20: " in result.out
    assert "a little longer than unprofiled ones" in result.out
    assert "llama.cpp" not in result.out


def test_the_profile_of_a_step_adds_up(run: Run) -> None:
    _, record, _ = run
    deep, together = record["models"][0]["profiles"]
    assert (deep["streams"], deep["depth"], together["streams"], together["depth"]) == (1, 20, 3, 0)
    for profile in (deep, together):
        rows = profile["rows"]
        calls = {row["name"]: row["calls"] for row in rows}
        assert calls["attention"] == 3  # the model has three layers
        assert calls["linear ffn_gate"] == 3
        assert calls["linear token_embd"] == 1  # it is the output matrix too
        assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
        shares = sum(row["share_of_step"] for row in rows) + profile["rest"]["share_of_step"]
        assert shares == pytest.approx(1)
        known = {row["name"] for row in rows if row["n_bytes"] is not None}
        assert known == {name for name in calls if name.startswith(("linear", "attention"))}
        assert profile["unprofiled_step_s"] > 0


def test_the_page_has_the_plots_and_loads_nothing(run: Run) -> None:
    _, record, page = run
    assert page.count("<svg") == 7
    for words in ("Decode by streams, at depth 0", "Decode of one stream by depth", "A step by operation", "a copy"):
        assert words in page
    for axis in ("tokens/s, all streams", "streams decoded together", "tokens of the prompt", "% of a copy"):
        assert axis in page
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', page) == []
    assert "@import" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    changed = copy.deepcopy(record)
    changed["models"][0]["model"] = "<script>alert(1)</script>"
    assert "<script>" not in to_html(changed)


@pytest.mark.ci
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_screen_and_a_phone(run: Run, tmp_path: Path, width: int) -> None:
    path = tmp_path / "speed.html"
    path.write_text(run[2])
    with chromium() as browser:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(path.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        sizes = browser.execute_script("return [...document.querySelectorAll('svg')].map(e => e.clientWidth)")
        assert min(sizes) >= 300
        assert "refengine" in texts(browser, "figure svg text")
        assert browser.get_log("browser") == []


# ---- kernels ---------------------------------------------------------------------------------------------------------


def of_kernels(model: Path, device: str, folder: Path) -> dict[str, Any]:
    output = folder / "kernels.json"
    sizes = ("--prompts", "8", "--depths", "0", "--streams", "1,3", "--tokens", "2", "--rounds", "1")
    result = cli("bench", "speed", "--model", model, "--device", device, *sizes, "--profile", "--json", output)
    assert result.code == 0, result.err
    assert "longer than unprofiled ones" in result.out
    found: dict[str, Any] = json.loads(output.read_text())["models"][0]
    return found


def check_kernels(found: dict[str, Any]) -> None:
    assert [size["label"] for size in found["measurements"]][1:] == [
        "decode, 1 stream at depth 0",
        "decode, 3 streams at depth 0",
    ]
    rows = {row["name"]: row for row in found["profiles"][0]["rows"]}
    assert found["profiles"][0]["by"] == "kernel"
    assert rows["one_row ffn_gate"]["calls"] == 3
    assert rows["one_row ffn_gate"]["n_bytes"] > 3 * 2 * 288 * 768 * 5 / 8  # two matrices of five bits in 3 layers
    assert rows["attention_step_64"]["n_bytes"] > 0
    assert rows["draw_f32"]["n_bytes"] is None
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.ci
def test_a_step_by_kernel(tiny_model: ModelFiles, tmp_path: Path) -> None:
    check_kernels(of_kernels(tiny_model("qwen2-q4_k_m"), "host", tmp_path))


@pytest.mark.gpu
def test_on_a_gpu(tiny_model: ModelFiles, tmp_path: Path) -> None:
    try:
        open_device("cuda")
    except DeviceError as e:
        pytest.skip(f"no GPU: {e}")
    found = of_kernels(tiny_model("qwen2-q4_k_m"), "cuda", tmp_path)
    check_kernels(found)
    assert found["engines"]["refengine"]["device"] == "cuda:0"
    assert found["copy_bytes_per_s"]["median"] > 0
    steps = [profile["step_s"] for profile in found["profiles"]]
    kernels = [sum(row["seconds"] for row in profile["rows"]) for profile in found["profiles"]]
    assert all(kernel < step for kernel, step in zip(kernels, steps, strict=True))


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.mark.llamacpp
def test_beside_llamacpp(tiny_model: ModelFiles, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    output, page = tmp_path / "both.json", tmp_path / "both.html"
    model = tiny_model("qwen2-q4_k_m")
    options = ("--compare", "llama.cpp", "--threads", "1", "--json", output, "--html", page)
    result = cli("bench", "speed", "--model", model, *TINY_SIZES, *options)
    assert result.code == 0, result.err
    record = json.loads(output.read_text())
    (found,) = record["models"]
    peer = found["engines"]["llama.cpp"]
    assert peer["version"].startswith("llama-cpp-python ")
    assert peer["repack"] == ("without repacked weights" not in result.out)
    for size in found["measurements"]:
        ours, theirs = (size["engines"][name] for name in ("refengine", "llama.cpp"))
        same = [[(sample["tokens"], sample["positions"]) for sample in engine["samples"]] for engine in (ours, theirs)]
        assert same[0] == same[1], "both do the same work"
        pairs = [b["seconds"] / a["seconds"] for a, b in zip(ours["samples"], theirs["samples"], strict=True)]
        assert size["ratio"]["pairs"] == pytest.approx(pairs)
        assert size["ratio"]["median"] == pytest.approx(statistics.median(pairs))
    assert "ratio" in result.out
    assert "above 1, refengine is faster" in result.out
    assert page.read_text().count("llama.cpp</text>") == 3


@pytest.mark.llamacpp
def test_llamacpp_is_measured_without_repacked_weights_if_it_crashes_with_them(
    tiny_model: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    monkeypatch.setattr("refengine.validate.llamacpp._TRIAL", "import os; os.abort()")
    output, page = tmp_path / "both.json", tmp_path / "both.html"
    sizes = ("--prompts", "8", "--depths", "0", "--streams", "1", "--tokens", "2", "--rounds", "1", "--threads", "1")
    options = ("--compare", "llama.cpp", "--json", output, "--html", page)
    result = cli("bench", "speed", "--model", tiny_model("llama-q8_0"), *sizes, *options)
    assert result.code == 0, result.err
    assert "warning: llama.cpp crashes with repacked weights on this processor" in result.err
    (found,) = json.loads(output.read_text())["models"]
    assert found["engines"]["llama.cpp"]["repack"] is False
    for text in (result.out, page.read_text()):
        said = "without repacked weights, since llama.cpp crashes with them on this processor"
        assert said in " ".join(text.split())


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["llama-q8_0", "phi3-q8_0"])  # phi3 has a sliding window
def test_llamacpps_cache_holds_what_a_size_asks_for(name: str, tiny_model: ModelFiles) -> None:
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    from refengine.bench.speed.llamacpp import LlamaCppSpeed
    from refengine.validate.llamacpp import library

    engine = LlamaCppSpeed(str(tiny_model(name)), "cpu", 16, 1, repack=False)
    try:
        for streams, depth in ((1, 0), (3, 5), (3, 5), (2, 40)):
            sample = engine.decode(streams, depth, 2)
            assert (sample.tokens, sample.positions) == (2 * streams, max(depth, 1) + 1.5)
            memory = library().llama_get_memory(engine._context)
            ends = [library().llama_memory_seq_pos_max(memory, sequence) for sequence in range(streams)]
            assert ends == [max(depth, 1) + 1] * streams
        assert engine.prompt(40).tokens == 40
        assert engine.step_bytes(2, 10) - engine.step_bytes(1, 10) == engine.cache_bytes(10)
    finally:
        engine.close()


# ---- the engine under test -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tiny_model: ModelFiles) -> Refengine:
    return Refengine(str(tiny_model("llama-q8_0")), "cpu", None, 16, 1)


@pytest.mark.parametrize(("streams", "depth"), [(1, 0), (1, 40), (3, 0), (3, 5)])
def test_a_sample_has_the_tokens_and_positions_of_its_size(ours: Refengine, streams: int, depth: int) -> None:
    for _ in range(2):
        sample = ours.decode(streams, depth, 4)
        assert (sample.tokens, sample.positions) == (4 * streams, max(depth, 1) + 2.5)
    assert ours._engine is not None
    assert ours._engine.idle


def test_several_streams_with_long_prompts_are_all_decoded(ours: Refengine) -> None:
    """The first streams decode while the last prompts are computed, so that they are a little deeper."""
    sample = ours.decode(4, 40, 3)
    assert sample.tokens == 12
    assert 41 <= sample.positions - 1 <= 60


def test_the_bytes_of_a_step(ours: Refengine) -> None:
    model = ours.model
    weights = sum(int(np.prod(w.shape)) for w in model.weights.products())
    vectors = sum(int(np.prod(t.shape)) for t in model.gguf.tensors.values() if len(t.shape) == 1)
    cache = 2 * model.config.n_layer * model.config.n_embd_kv
    assert ours.step_bytes(2, 10) == 4 * (weights + vectors + 2 * 10 * cache)
    assert ours.cache_bytes(64) == 4 * 64 * cache


def test_of_experts_only_those_of_one_token_count(tiny_model: ModelFiles) -> None:
    with GGUFFile(tiny_model("gpt-oss-f32")) as gguf:
        config = read_config(gguf)
        found = weight_bytes(gguf.tensors, config, lambda info: info.n_bytes)
        experts = sum(t.n_bytes for t in gguf.tensors.values() if "_exps." in t.name)
        others = sum(t.n_bytes for t in gguf.tensors.values() if "_exps." not in t.name)
        others -= gguf.tensors["token_embd.weight"].n_bytes
    assert found == pytest.approx(others + experts * config.n_expert_used / config.n_expert)
    window = config.n_swa
    read = cache_bytes_read(config, 1, 10 * window, 1.0)
    assert read == pytest.approx(window * (1 + 9 * sum(not w for w in config.swa_layers) / config.n_layer))


def test_the_bandwidth_of_a_copy() -> None:
    assert free_memory(np) > 0
    rates = copy_rates(np, 2, 64 << 20)
    assert len(rates) == 5
    assert min(rates) > 0


def test_a_process_that_ends_is_named(tiny_model: ModelFiles) -> None:
    with EngineProcess(Setup("refengine", str(tiny_model("llama-q8_0")), "cpu", None, 16, 1)) as engine:
        assert engine.prompt(4).tokens == 4
        with pytest.raises(Refused, match="1048576 tokens, but the context has"):
            engine.prompt(1 << 20)
        assert engine.prompt(4).tokens == 4
        engine._process.kill()
        with pytest.raises(
            RefengineError, match=r"the process of refengine was killed \(SIGKILL\), perhaps because memory"
        ):
            engine.prompt(4)


def test_a_process_that_crashes_says_where_it_was(tiny_model: ModelFiles) -> None:
    with EngineProcess(Setup("refengine", str(tiny_model("llama-q8_0")), "cpu", None, 16, 1)) as engine:
        os.kill(engine._process.pid, signal.SIGSEGV)
        with pytest.raises(RefengineError, match=r"the process of refengine crashed \(SIGSEGV\)") as caught:
            engine.prompt(4)
    assert re.search(r"; Python was in main \(process.py:\d+\)", str(caught.value))


@pytest.mark.llamacpp
def test_a_crash_of_llamacpp_is_told_with_its_last_messages(tiny_model: ModelFiles) -> None:
    """A process that is gone cannot be asked, so that all it logs is in a file as soon as it is logged."""
    pytest.importorskip("llama_cpp", reason="install the extra validate to compare with llama.cpp")
    model = str(tiny_model("llama-q8_0"))
    with EngineProcess(Setup("llama.cpp", model, "cpu", None, 16, 1, repack=False)) as engine:
        assert engine.prompt(4).tokens == 4
        os.kill(engine._process.pid, signal.SIGSEGV)
        with pytest.raises(RefengineError, match=r"crashed \(SIGSEGV\)") as caught:
            engine.prompt(4)
    assert re.search(r"; its last messages: .*llama_.*; Python was in main \(process.py:", str(caught.value))


def test_the_last_words_of_a_process() -> None:
    assert last_words("") == ""
    assert last_words("a\n....\n b \n") == "; its last messages: a | b"
    log = "".join(f"{i}\n" for i in range(20))
    other = 'Thread 0x1 (most recent call first):\n  File "/lib/threading.py", line 9 in run\n\n'
    ours = 'Current thread 0x2 (most recent call first):\n  File "/a/b.py", line 3 in load\n'
    ours += '  File "<frozen runpy>", line 88 in _run_code\n\nExtension modules: numpy.random (total: 1)\n'
    crash = "Fatal Python error: Segmentation fault\n\n"
    said = "; its last messages: 12 | 13 | 14 | 15 | 16 | 17 | 18 | 19"
    assert last_words(f"{log}{crash}{other}{ours}") == f"{said}; Python was in load (b.py:3)"
    assert last_words(f"{log}{crash}{other}") == f"{said}; Python was in run (threading.py:9)"
    assert last_words(crash) == ""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "ended with exit code 3: see its messages above"),
        (-11, "crashed (SIGSEGV), which is a fault in it or in a library that it uses"),
        (-9, "was killed (SIGKILL), perhaps because memory ran out"),
        (-200, "crashed (signal 200), which is a fault in it or in a library that it uses"),
    ],
)
def test_how_a_process_ended_is_said_in_words(code: int, words: str) -> None:
    assert ending(code) == words


def test_a_process_ends_with_the_benchmark_even_while_it_measures(tiny_model: ModelFiles) -> None:
    with EngineProcess(Setup("refengine", str(tiny_model("llama-q8_0")), "cpu", None, 16, 1)) as engine:
        assert engine._process.stdin is not None
        request = {"do": "decode", "streams": 1, "depth": 0, "tokens": 400}
        engine._process.stdin.write("".join(json.dumps(request) + "\n" for _ in range(1000)))
        engine._process.stdin.close()
        assert engine._process.wait(30) == 0


# ---- arithmetic ------------------------------------------------------------------------------------------------------


class Fake:
    """An engine that notes its turns. Every sample takes a second longer than the one before."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns, self.n = name, turns, 0

    def prompt(self, n: int) -> Sample:
        self.turns.append(self.name)
        self.n += 1
        return Sample(float(self.n), n)

    def decode(self, streams: int, depth: int, tokens: int) -> Sample:
        return self.prompt(streams * tokens)

    def step_bytes(self, streams: int, positions: float) -> int:
        return 0

    def cache_bytes(self, n_positions: int) -> int:
        return 1000 * n_positions


def test_engines_take_turns_and_the_first_turn_does_not_count() -> None:
    turns: list[str] = []
    pauses: list[float] = []
    ours, theirs = measure([Fake("A", turns), Fake("B", turns)], Prompt(12), 3, pauses.append)
    assert "".join(turns) == "ABABABAB"
    assert len(pauses) == 8
    assert [sample.seconds for sample in ours.samples] == [2, 3, 4]
    assert ours.rate == Spread(4, 3, 6)
    assert ours.milliseconds == Spread(3000, 2000, 4000)
    assert ratios(ours, theirs) == [1, 1, 1]


def test_ratios_are_of_neighbouring_samples() -> None:
    size = Decode(2, 0, 5)
    ours = Measurement(size, (Sample(1, 10, 4.0), Sample(2, 10, 6.0), Sample(4, 10, 8.0)))
    theirs = Measurement(size, (Sample(2, 10), Sample(2, 10), Sample(2, 10)))
    assert ratios(ours, theirs) == [2, 1, 0.5]
    assert ours.milliseconds == Spread(400, 200, 800)
    assert ours.positions == 6
    assert Compared(size, {"refengine": ours, "llama.cpp": theirs}).ratios == [2, 1, 0.5]
    assert Compared(size, {"refengine": ours}).ratios == []


def test_sizes() -> None:
    sizes = Sizes(prompts=(8, 8, 4), depths=(16, 2), streams=(1, 2), tokens=3, rounds=1)
    assert sizes.all() == [Prompt(8), Prompt(4), Decode(1, 16, 3), Decode(1, 2, 3), Decode(2, 2, 3)]
    assert Settings("cpu", sizes, 1, compare=True).engines == ["refengine", "llama.cpp"]


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (Prompt(99), None),
        (Prompt(100), "it needs 101 positions, and the model's context has 100"),
        (Decode(1, 97, 2), None),
        (Decode(1, 98, 2), "it needs 101 positions, and the model's context has 100"),
        (Decode(8, 90, 2), "its KV cache needs 1 MB, and of the memory 1 MB are free"),
    ],
)
def test_why_a_size_is_left_out(size: Size, reason: str | None) -> None:
    assert why_not(size, 100, 1_000_000, [Fake("A", []), Fake("B", [])]) == reason


def test_what_is_profiled() -> None:
    def compared(*sizes: Size) -> list[Compared]:
        return [Compared(size, {}) for size in sizes]

    several = compared(Prompt(8), Decode(1, 0, 1), Decode(1, 9, 1), Decode(4, 0, 1))
    assert to_profile(several) == several[2:]
    assert to_profile(several[:2]) == several[1:2]
    assert to_profile(several[:1]) == []


def test_names_of_tensors_are_joined_over_layers() -> None:
    assert tensor_kind("blk.13.ffn_gate_exps.weight") == "ffn_gate_exps"
    assert tensor_kind("output.weight") == "output"
    assert [number(value) for value in (0.014, 9.876, 98.76, 987.6, 9876.0)] == ["0.01", "9.88", "98.8", "988", "9,876"]


# ---- comparison with an earlier run ----------------------------------------------------------------------------------


def scaled(record: dict[str, Any], *factors: float) -> dict[str, Any]:
    """The record with samples of one second, times these factors."""
    changed = copy.deepcopy(record)
    for size in changed["models"][0]["measurements"]:
        samples = size["engines"]["refengine"]["samples"]
        size["engines"]["refengine"]["samples"] = [{**samples[0], "seconds": factor} for factor in factors]
    return changed


@pytest.mark.parametrize(
    ("before", "now", "slower"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), False),
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), True),
        ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), False),
        ((0.98, 1.0, 1.02), (1.2, 1.22, 1.24), True),
        ((0.5, 1.0, 2.0), (1.2, 1.22, 1.24), False),
        ((0.98, 1.0, 1.02), (0.7, 1.22, 1.24), False),
        ((0.98, 1.0, 1.02), (1.03, 1.04, 1.05), False),  # no overlap, but less than both vary
    ],
)
def test_slower_is_what_fell_by_more_than_both_vary(
    run: Run, before: tuple[float, ...], now: tuple[float, ...], slower: bool
) -> None:
    comparison = against(scaled(run[1], *before), scaled(run[1], *now))
    assert len(comparison.changes) == 4
    assert comparison.remarks == ()
    assert len(comparison.slower) == (4 if slower else 0)
    assert comparison.changes[0].ratio == pytest.approx(before[1] / now[1])


def test_what_cannot_be_compared_is_said(run: Run) -> None:
    old = scaled(run[1], 1.0, 1.0)
    new = copy.deepcopy(old)
    del new["models"][0]["measurements"][0]
    samples = new["models"][0]["measurements"][0]["engines"]["refengine"]["samples"]
    del samples[1]
    new["machine"], new["settings"]["threads"], new["settings"]["sizes"]["tokens"] = "another", 99, 4
    comparison = against(old, new)
    assert len(comparison.changes) == 2
    said = " / ".join(comparison.remarks)
    assert "prompt of 8 tokens is only in the earlier run" in said
    assert "decode, 1 stream at depth 0 has a single sample" in said
    assert "another now" in said
    assert "99 now" in said
    assert "tokens: 3 before, 4 now" in said
    new["models"] = []
    with pytest.raises(RefengineError, match="nothing to compare with"):
        against(old, new)


@pytest.mark.parametrize(("seconds", "code"), [(1e-9, 1), (1e9, 0)])
def test_the_exit_code_says_whether_it_became_slower(
    run: Run, tiny_model: ModelFiles, tmp_path: Path, seconds: float, code: int
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(scaled(run[1], seconds, seconds, seconds)))
    sizes = ("--prompts", "8", "--depths", "0", "--streams", "1", "--tokens", "3", "--rounds", "2")
    result = cli("bench", "speed", "--model", tiny_model("qwen2-q4_k_m"), *sizes, "--baseline", old)
    assert result.code == code, result.err
    assert f"{2 * code} of 2 became slower" in result.err
    slower = [line for line in result.err.splitlines() if line.startswith("refengine: slower: qwen2-q4_k_m.gguf: ")]
    assert len(slower) == 2 * code
    assert "prompt of 8 tokens" in result.out
    assert "decode, 3 streams at depth 0 is only in the earlier run" in result.out


def test_the_last_record_of_a_model_on_a_gpu_is_found(run: Run, tmp_path: Path) -> None:
    on_gpu = {**run[1], "device": "cuda:0"}
    for name, record in (("2026-01-01-a", on_gpu), ("2026-02-01-b", on_gpu), ("2026-03-01-c", run[1])):
        (tmp_path / f"{name}-speed.json").write_text(json.dumps(record))
    found = last_record(tmp_path, "qwen2-q4_k_m.gguf")
    assert found is not None
    assert found.name == "2026-02-01-b-speed.json"
    assert last_record(tmp_path, "other.gguf") is None


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "8,x"], "--prompts '8,x' is not a list of whole numbers"),
        (["--prompts", "0"], "--prompts 0: 0 is not allowed; allowed are 1 to"),
        (["--depths", "-1"], "--depths -1: -1 is not allowed; allowed are 0 to"),
        (["--streams", "1,2000"], "--streams 1,2000: 2000 is not allowed; allowed are 1 to 1024"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--threads", "-2"], "--threads -2 must be at least 1"),
        (["--device", "tpu"], "--device tpu: choose cpu, cuda or cuda:N"),
        (["--compare", "vllm"], "--compare vllm: the only other engine is llama.cpp"),
        (["--json", "speed.txt"], "--json speed.txt must end in .json"),
        (["--html", "/nowhere/speed.html"], "--html /nowhere/speed.html: folder /nowhere does not exist"),
        (["--baseline", "/nowhere.json"], "--baseline /nowhere.json cannot be read: No such file"),
        (["--model", "a.gguf", "--model", "./a.gguf"], "two files have the same name"),
        (["--model", "/nowhere.gguf"], "/nowhere.gguf"),
    ],
)
def test_unusable_arguments(arguments: list[str], message: str) -> None:
    result = cli("bench", "speed", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "refengine-verdict"}', '{"schema": "refengine-speed"}'])
def test_a_file_that_is_no_earlier_result(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    error = cli("bench", "speed", "--baseline", path).error
    assert f"--baseline {path}" in error


def test_if_nothing_fits_that_is_an_error(tiny_model: ModelFiles) -> None:
    sizes = ("--prompts", "5000", "--depths", "6000", "--streams", "1")
    result = cli("bench", "speed", "--model", tiny_model("llama-q8_0"), *sizes)
    assert result.code == 2
    assert "no size could be measured: prompt of 5,000 tokens: it needs 5,001 positions" in result.err


def test_help() -> None:
    text = " ".join(cli("bench", "speed", "--help").out.split())
    for words in ("--compare llama.cpp", "--baseline OLD.json", "--profile", "in turns", "--prompts 128,512"):
        assert words in text
    assert "speed" in cli("bench", "--help").out
