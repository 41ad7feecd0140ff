"""The pytest fixture `assert_agrees` for other engines' test suites. pytest finds it if refengine is installed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_agrees() -> Callable[..., Any]:
    """`assert_agrees(model, prompt=None, *, peer="llama.cpp", …)`: fails the test, with the verdict, on divergence.

        def test_my_engine(assert_agrees):
            my_engine.dump("model.gguf", "Hello", folder="dump")
            assert_agrees("model.gguf", peer="dump", numerics="exact")

    See `check_agreement` for the arguments.
    """
    return check_agreement


def check_agreement(
    model: str | Path,
    prompt: str | Sequence[int] | None = None,
    *,
    peer: str | Path = "llama.cpp",
    names: str | Path | None = None,
    device: str = "cpu",
    numerics: str = "llamacpp",
    kv_type: str | None = None,
    tolerances: Sequence[tuple[str, float]] = (),
    any_model: bool = False,
    **llamacpp: Any,
) -> Any:
    """Compare `peer` with refengine on a prompt (text, ids, or None for a built-in sentence or the dump's prompt).

    peer: as for `refengine validate --peer`. names: the name map of a dump. numerics: `exact` for an engine that
    multiplies dequantised weights. tolerances: (expression on names, NMSE). llamacpp: n_threads, n_ubatch,
    flash_attention, repack.
    Returns the `Outcome`; fails the test if the engines diverge or nothing was compared. Raises RefengineError for
    wrong arguments.
    """
    __tracebackhide__ = True
    from rich.console import Console

    import refengine
    from refengine.errors import RequestError
    from refengine.validate.capture import sha256_of_file
    from refengine.validate.dump import NameMap
    from refengine.validate.peers import capture_peer, is_dump
    from refengine.validate.report_text import print_outcome
    from refengine.validate.run import validate

    if prompt is not None and is_dump(str(peer)):
        raise RequestError("a dump contains its prompt: do not give another one")
    loaded = refengine.load(model, device, numerics, kv_type=kv_type, cpu_cache_mb=0)
    ids = None if prompt is None else loaded.prompt_ids(prompt)
    capture = capture_peer(str(peer), loaded, ids, names=NameMap.read(names) if names else None, **llamacpp)
    sha256 = sha256_of_file(loaded.gguf.path)
    outcome = validate(loaded, capture, tolerances=tolerances, model_sha256=sha256, any_model=any_model)
    if not outcome:
        text = io.StringIO()
        print_outcome(outcome, Console(file=text, width=120, highlight=False))
        pytest.fail(text.getvalue(), pytrace=False)
    return outcome
