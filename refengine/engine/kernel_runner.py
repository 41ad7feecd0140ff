"""Steps on raw kernels: decoding through the fused step, prompts through the model file, draws on the device.

The same bits as `model.step` for all of them together. Knows nothing of scheduling and text."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from refengine.cuda.decode import DecodeRow, DecodeStep
from refengine.cuda.sampling import checked_tokens, sample_rows
from refengine.engine.runner import Drawn, last_rows, with_logprobs
from refengine.engine.scheduler import Part
from refengine.errors import RefengineError
from refengine.kv_cache import KVCache, Sequence
from refengine.trace import to_numpy


class KernelRunner:
    """max_batch: rows of the fused step. graphs: capture it once for each bucket, or launch its kernels one by one."""

    def __init__(self, model: Any, cache: KVCache, max_batch: int, graphs: bool) -> None:
        self._model, self._cache = model, cache
        self._step: DecodeStep | None = None
        if DecodeStep.supports(model.config) and model.ops.attention_by == "flash":
            self._step = DecodeStep(model.ops, model.config, model.weights, cache, max_batch=max_batch, graphs=graphs)

    def warm_up(self, n_prompt: int) -> None:
        """Compile the kernels and capture the graphs; let a prompt take from the pool what it wants."""
        if self._step is not None:
            self._step.warm_up()
        if n_prompt:
            sequence = Sequence()
            self._model.step([(sequence, [0] * n_prompt)], self._cache, [n_prompt - 1])
            self._cache.free(sequence)
            self._model.ops.memory.settle()

    def run(self, parts: SequenceOf[Part]) -> list[Drawn]:
        """As `ArrayRunner.run`."""
        fused = self._step is not None
        decoding = [part for part in parts if fused and part.decodes]
        others = [part for part in parts if not (fused and part.decodes)]
        found: dict[int, Drawn] = {}
        if decoding:
            assert self._step is not None
            drawn, logits = self._step.run([row_of(part) for part in decoding])
            found |= self._results(decoding, drawn, logits)
        if others:
            drawing = [part for part in others if part.draws]
            given = [(part.generation.progress.cached, part.ids) for part in others]
            logits = self._model.step(given, self._cache, last_rows(others))
            if drawing:
                found |= self._results(drawing, to_numpy(self._draw(drawing, logits)), logits)
        # The fused step fills positions behind the cache's back.
        self._cache.commit([(part.generation.progress.cached, part.ids) for part in decoding])
        return [found[id(part)] for part in parts if part.draws]

    def _draw(self, parts: SequenceOf[Part], logits: Any) -> Any:
        generations = [part.generation for part in parts]
        ops = self._model.ops
        with ops.workspace():
            return sample_rows(
                ops.xp,
                ops.kernels,
                logits,
                [g.params for g in generations],
                [g.ids for g in generations],
                [g.seed for g in generations],
                [g.n_generated for g in generations],
            )

    @staticmethod
    def _results(parts: SequenceOf[Part], drawn: Any, logits: Any) -> dict[int, Drawn]:
        results = {}
        for i, part in enumerate(parts):
            try:
                (token,) = checked_tokens(drawn[i : i + 1])
                n_top = part.generation.params.logprobs
                results[id(part)] = Drawn(token) if n_top is None else with_logprobs(token, to_numpy(logits[i]), n_top)
            except RefengineError as e:
                results[id(part)] = Drawn(error=e)
        return results


def row_of(part: Part) -> DecodeRow:
    g = part.generation
    cached = g.progress.cached
    return DecodeRow(
        key=g,
        token=part.ids[0],
        position=cached.length,
        block_table=cached.block_table,
        params=g.params,
        seed=g.seed,
        index=g.n_generated,
        history=g.ids,
    )
