"""Training: PyTorch's forward pass is the engine's, and a run that was broken off goes on as if it had not been."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install the extra haiku to train models")

import refengine  # noqa: E402
from refengine.validate.metrics import nmse  # noqa: E402
from tools.haiku import train  # noqa: E402
from tools.haiku.export import CHECKPOINT, keep_checkpoint, load_checkpoint, write_gguf  # noqa: E402
from tools.haiku.network import HaikuModel  # noqa: E402
from tools.haiku.specs import SPECS  # noqa: E402


@pytest.mark.parametrize("name", SPECS)
def test_forward_pass_is_the_engines(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model = HaikuModel(spec, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial zeros and ones, logits of order one
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    weights = {name: value.numpy() for name, value in model.state().items()}
    write_gguf(tmp_path / "m.gguf", spec, weights, CHECKPOINT / "tokenizer.json")
    ids = np.random.default_rng(0).integers(0, spec.n_vocab, 150)  # well past the sliding window of 32
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)[None])[0][0].numpy()
    ours = refengine.load(tmp_path / "m.gguf").forward(ids.tolist())
    # float32 sums in another order over four to six layers; measured 6e-12 and 2e-13.
    assert nmse(ours, theirs) < 1e-10


def run(output: Path, *options: str) -> dict[str, np.ndarray]:
    few = ("--documents", "300", "--batch", "1024", "--device", "cpu", "--steps", "6", "--output", str(output))
    train.main(["experts", *few, *options])
    keep_checkpoint(output, "experts", output / "kept")
    return load_checkpoint("experts", output / "kept")


def test_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="install the extra haiku to train models")
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    monkeypatch.setattr(train, "VALIDATION", 8)
    unbroken = run(tmp_path / "a")

    def stop(*args: object) -> float:
        raise KeyboardInterrupt

    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, args: rate(step, args) if step < 4 else stop())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    monkeypatch.setattr(train, "learning_rate", rate)
    resumed = run(tmp_path / "b", "--resume")
    assert unbroken.keys() == resumed.keys()
    assert all(np.array_equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step\n")
    with pytest.raises(SystemExit, match="--resume or --overwrite"):
        run(tmp_path)
