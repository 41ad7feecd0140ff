"""Implements `refengine generate`: continues a prompt, printing text to stdout and statistics to stderr."""

from __future__ import annotations

import argparse

from refengine.cli.console import check_trace, chunk, load_model, progress_bar, prompt_of, say, tracer, write
from refengine.engine.engine import single_sequence
from refengine.engine.generation import Generation
from refengine.engine.sampling import SamplingParams
from refengine.errors import RequestError


def generate(arguments: argparse.Namespace) -> None:
    params = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
    )
    text, ids = prompt_of(arguments)
    model = load_model(arguments)
    tokenizer = model.vocabulary
    chat = arguments.chat
    if chat is None:
        chat = text is not None and tokenizer is not None and tokenizer.chat_template is not None
    if chat:
        if text is None or tokenizer is None:
            raise RequestError("--chat needs a text prompt and a model with a vocabulary")
        prompt_ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    else:
        prompt_ids = model.prompt_ids(ids if text is None else text)
    trace = tracer(arguments)
    engine, generation = single_sequence(
        model,
        prompt_ids,
        params,
        chunk=chunk(arguments),
        trace=trace,
        graphs=not arguments.no_graphs,
        ahead=not arguments.no_ahead,
    )
    if arguments.echo or (arguments.echo is None and not chat and text is not None):
        write(text if text is not None else ",".join(map(str, prompt_ids)) + ":")
    reason = "interrupted"
    try:
        with progress_bar("prompt", len(prompt_ids), "token") as bar:
            while not generation.pending and generation.end is None:
                engine.step()
                bar.update(generation.progress.cached.length - bar.n)
        for token in engine.tokens(generation):
            # Without a vocabulary there is no text, so the ids are printed.
            write(token.text if tokenizer is not None else f" {token.id}")
            reason = token.stop_reason or reason
    finally:
        if generation.n_generated:
            write("\n")
        _print_statistics(generation, reason)
        engine.free(generation)
    check_trace(trace)


def _print_statistics(generation: Generation, reason: str) -> None:
    n = generation.n_generated
    decode = f", decode {(n - 1) / generation.decode_s:.1f} tokens/s" if n > 1 and generation.decode_s else ""
    prefill = f"{generation.n_prompt / generation.prefill_s:.1f} tokens/s" if generation.prefill_s else "-"
    say(
        f"prompt {generation.n_prompt} tokens ({prefill}), {n} generated{decode}, first token after "
        f"{generation.prefill_s * 1000:.0f} ms, stop: {reason}, seed {generation.seed}"
    )
