"""The `refengine` command: arguments only. What each command does is in `refengine.commands`."""

from __future__ import annotations

import argparse
import bdb
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from refengine.errors import RefengineError, one_line

DESCRIPTION = """Run GGUF language models as readable array code that matches llama.cpp to its rounding noise."""

EPILOG = """examples:
  refengine generate "Write a haiku about GPU computing"
  refengine generate "Once upon a time" --model stories260K.gguf --temperature 0
  refengine generate "Hello" --model hf:OWNER/REPO:Q4_K_M        (downloaded once)
  refengine inspect --model model.gguf
  refengine logits --model model.gguf --prompt "Hello" --numerics llamacpp --output logits.npz
  refengine trace --model model.gguf --prompt "Hello" --filter 'Qcur-[01]$' --output qcur.safetensors
  refengine validate --model model.gguf        (against llama.cpp)
  refengine validate --model model.gguf --peer my_dump --html report.html        (against tensors of your own engine)
  refengine serve --worker-id $(uuidgen) --model model.gguf --gpu-device 0 --port 8080
  refengine ask "Write a haiku about the sea" --seed 7        (a worker that serves)
  refengine bench worker --quick        (every speed of the worker beside its target)
  refengine compile --arch sm_90a        (when building an image for GPUs; serve then starts in seconds)
  refengine generate "Hello" --model model.gguf --break Qcur-3     (stops in pdb at that tensor)
"""

HUB_HELP = """or hf:OWNER/REPO[@REVISION][:QUANT or :FILE.gguf], downloaded into the cache of huggingface_hub (HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE); QUANT is a part of the file's name, as Q4_K_M; without, it is the only model of the repo or
its only Q4_K_M"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except where there is none or the help text gives it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default in ([], "", False):
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    from refengine import __version__

    parser = argparse.ArgumentParser(
        prog="refengine", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Help, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"refengine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", "continue a prompt, streaming text to stdout and statistics to stderr")
    generate.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt (or --prompt, --ids)")
    _model_arguments(generate)
    _prompt_arguments(generate)
    _sampling_arguments(generate)
    _trace_arguments(generate)
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the prompt through the model's chat template (default: if it has one)",
    )
    generate.add_argument(
        "--echo",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="print the prompt before its continuation (default: unless it went through a chat template)",
    )

    _kernel_switches(generate.add_argument_group("kernels, to compare (cuda and host)"))

    logits = _command(commands, "logits", "write the logits of every position of a prompt to an .npz file")
    _model_arguments(logits)
    _prompt_arguments(logits)
    _trace_arguments(logits)
    logits.add_argument(
        "--output",
        required=True,
        metavar="FILE.npz",
        help="where `ids` (n,) int64 and `logits` (n, n_vocab) float32 go (float64 under --numerics exact64)",
    )

    trace = _command(commands, "trace", "write named intermediate tensors of a prompt to a safetensors file")
    _model_arguments(trace)
    _prompt_arguments(trace)
    _trace_arguments(trace)
    trace.add_argument(
        "--output",
        metavar="FILE.safetensors",
        help="where the tensors go; their manifest goes beside it as FILE.manifest.json",
    )
    trace.add_argument("--filter", default="", metavar="RE", help="regular expression on tensor names; all by default")
    trace.add_argument("--list", action="store_true", help="print names, shapes and value ranges, write nothing")

    validate = _command(
        commands, "validate", "compare with llama.cpp or a dump: which tensor goes wrong first, and is it its own error"
    )
    validate.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt (default: a sentence of our own)")
    # Every weight is used in two passes only: keeping it would cost more memory than it saves time.
    _model_arguments(validate, numerics="llamacpp", cache_mb=0, several=True)
    _prompt_arguments(validate, chunk=False)
    group = validate.add_argument_group("the other engine")
    group.add_argument(
        "--peer",
        default="llama.cpp",
        metavar="PEER",
        help="llama.cpp (live, through llama-cpp-python), the folder or manifest of a dump, or refengine itself under "
        "other settings: refengine:exact64, refengine:cuda,f16",
    )
    group.add_argument("--names", metavar="FILE", help="YAML or JSON list of [expression, llama.cpp's name] for a dump")
    group.add_argument("--any-model", action="store_true", help="accept a dump made with another model file")
    group.add_argument("--threads", type=int, default=2, metavar="N", help="of llama.cpp")
    group.add_argument("--ubatch", type=int, metavar="N", help="llama.cpp's micro-batch in tokens (default: all)")
    group.add_argument("--flash-attention", action="store_true", help="let llama.cpp fuse attention")
    group.add_argument("--repack", action="store_true", help="let llama.cpp re-order weights for its fastest kernels")
    group = validate.add_argument_group("verdict")
    group.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="RE=NMSE",
        help="allowed error on own inputs of the tensors that match, instead of the measured floor; repeatable",
    )
    group.add_argument("--all", action="store_true", help="show every tensor")
    group.add_argument("--json", metavar="FILE.json", help="also write the verdict with every figure there")
    group.add_argument("--html", metavar="FILE.html", help="also write it as one page to open in a browser, offline")
    group = validate.add_argument_group("many prompts, many models")
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='a prompt a line: "text", [1, 2, 3], or {"id": …, "prompt": "text"}; --model may be given several times',
    )
    group.add_argument("--output", metavar="FILE.jsonl", help="where results are added; started again, it goes on")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side")

    tokenize = _command(commands, "tokenize", "print the token ids of a text as JSON, or the text of ids")
    tokenize.add_argument("text", nargs="?", metavar="TEXT", help="the text, or with --decode the ids as JSON or 1,2,3")
    tokenize.add_argument("--model", metavar="FILE", help=f"GGUF file; {HUB_HELP} (default: the packaged haiku model)")
    tokenize.add_argument("--decode", action="store_true", help="print the text of ids instead")
    tokenize.add_argument(
        "--special",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add BOS and EOS as the metadata says",
    )
    tokenize.add_argument(
        "--parse-special", action="store_true", help="read special tokens in the text (<|im_start|>…) as such"
    )
    tokenize.add_argument("--debug", action="store_true", help="show a traceback on errors")

    inspect = _command(commands, "inspect", "print metadata, tensor types, sizes and the kind of quantisation")
    inspect.add_argument("file", nargs="?", metavar="FILE", help=f"GGUF file; {HUB_HELP} (default: the packaged model)")
    inspect.add_argument("--model", metavar="FILE", help="the same as FILE")
    inspect.add_argument("--json", action="store_true", help="print one JSON object, with every tensor")
    inspect.add_argument("--debug", action="store_true", help="show a traceback on errors")

    compile_kernels = _command(
        commands, "compile", "compile the kernels ahead of a first start on a GPU (into $REFENGINE_CACHE); needs no GPU"
    )
    compile_kernels.add_argument(
        "--arch", action="append", metavar="SM", help="sm_80, sm_86, sm_89, sm_90a or all (default: this machine's GPU)"
    )
    compile_kernels.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    compile_kernels.add_argument("--debug", action="store_true", help="show a traceback on errors")

    serve = _command(commands, "serve", "serve one model on one device over HTTP")
    _serve_arguments(serve)

    ask = _command(
        commands, "ask", "send a prompt to a worker, streaming its answer to stdout and statistics to stderr"
    )
    _ask_arguments(ask)

    bench = _command(commands, "bench", "start a worker and measure it over HTTP, as its clients see it")
    _bench_arguments(bench)
    return parser


def _command(commands: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text, formatter_class=_Help, allow_abbrev=False
    )
    return parser


def _model_arguments(
    parser: argparse.ArgumentParser, numerics: str | None = None, cache_mb: int | None = None, several: bool = False
) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="FILE",
        action="append" if several else "store",
        help=f"GGUF file; of a split one, the first part; {HUB_HELP} (default: the packaged model, which writes haiku)",
    )
    group.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda, cuda:N, auto (a GPU if one serves; says which and why), or host (the CUDA kernels on the CPU, "
        "to test and step through); an explicit device never falls back to another",
    )
    group.add_argument(
        "--numerics",
        default=numerics,
        choices=("exact", "exact64", "llamacpp", "fast"),
        help="exact: float32 on the dequantised weights; exact64: float64; llamacpp: rounded as llama.cpp's CPU; "
        "fast: rounded as the GPU kernels round, which it is on cuda and host "
        f"(default: {numerics or 'fast on cuda and host, else exact'})",
    )
    group.add_argument(
        "--kv-type",
        choices=("f16", "f32", "f64"),
        help="type of the KV cache (default: f16 for llamacpp and fast, else full)",
    )
    group.add_argument("--ctx", type=int, metavar="N", help="context in tokens (default: the model's)")
    group.add_argument(
        "--cpu-cache-mb",
        type=int,
        default=cache_mb,
        metavar="MIB",
        help="dequantised weights to keep, in MiB; 0 dequantises at every use"
        f" (default: {'half of the memory' if cache_mb is None else cache_mb})",
    )
    group.add_argument("--debug", action="store_true", help="show a traceback on errors")


def _prompt_arguments(parser: argparse.ArgumentParser, chunk: bool = True) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="TEXT", help="prompt as text; `-` reads standard input")
    group.add_argument("--ids", metavar="1,2,3", help="prompt as token ids, taken as they are; also as JSON: [1, 2, 3]")
    if chunk:
        group.add_argument("--chunk", type=int, default=512, metavar="N", help="prompt tokens a forward pass")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens to generate at most")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 to 2; 0 is greedy")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P", help="above 0, to 2; 1 is off")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0 is off")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep probability mass P; 1 is off")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 to 1; 0 is off")
    group.add_argument("--seed", type=int, metavar="N", help="0 to 2^64 - 1 (default: drawn, and reported)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop there; up to 4 times")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers stay text here: `commands_serve` checks them, and says what is allowed."""
    parser.epilog = """routes: POST /execute (answers with server-sent events), POST /cancel, POST /shutdown,
GET /health, GET /metrics (Prometheus); for OpenAI's clients POST /v1/completions and /v1/chat/completions,
GET /v1/models; POST /tokenize and /detokenize, GET /tokenizer_info; GET / (a page), /docs, /openapi.json.
SIGTERM and SIGINT end the worker as /shutdown does.

  curl -N http://127.0.0.1:8080/execute -d '{"job_id": "1", "prompt": "Write a haiku about GPU computing"}'

exit codes: 0 after a shutdown, 1 where the start fails (the log says why), 2 for wrong arguments"""
    group = parser.add_argument_group("required")
    group.add_argument("--worker-id", required=True, metavar="UUID", help="names this worker in its log")
    group.add_argument("--port", required=True, metavar="P", help="1024 to 65535")
    group.add_argument("--gpu-device", metavar="N", help="number of the GPU; it never falls back to the CPU")
    group.add_argument("--device", metavar="NAME", help="instead: cuda:N; cpu, on purpose; host (kernels on the CPU)")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="FILE", help=f"GGUF file; {HUB_HELP} (default: the packaged model, which writes haiku)"
    )
    group.add_argument("--kv-cache-size-mb", metavar="MIB", help="of the KV cache (default: what memory allows)")
    group.add_argument(
        "--on-shortage",
        choices=("preempt", "fail"),
        default="preempt",
        help="a running request that finds no block in the KV cache: the youngest is computed again later, or it fails",
    )
    group.add_argument("--residency-check-sec", default="60", metavar="S", help="between checks of the device memory")
    group = parser.add_argument_group("limits")
    group.add_argument("--max-tokens-in", metavar="N", help="tokens of a prompt (default: the context length)")
    group.add_argument("--max-tokens-out", default="2048", metavar="N", help="tokens of an answer, up to 2048")
    group.add_argument("--inference-timeout-sec", default="300", metavar="S", help="for a request, waiting included")
    group.add_argument(
        "--shutdown-grace-sec", default="2.5", metavar="S", help="for live requests at a shutdown, before they are cut"
    )
    group.add_argument(
        "--heartbeat-sec", default="15", metavar="S", help="of silence in a stream, then a comment is sent"
    )
    group.add_argument(
        "--metrics-event-sec", default="0", metavar="S", help="between events `metrics` in /execute's streams; 0: none"
    )
    group.add_argument("--max-batch", default="8", metavar="N", help="requests that run together")
    group.add_argument(
        "--max-step-tokens",
        metavar="N",
        help="of a step: what a long prompt may hold up streams for (default: 512; on the CPU 128)",
    )
    group.add_argument("--max-queue", default="64", metavar="N", help="requests that wait; more are sent away with 503")
    group = parser.add_argument_group("features, to compare without")
    group.add_argument("--no-batching", action="store_true", help="one request after the other")
    group.add_argument("--no-prefix-cache", action="store_true", help="compute prompts that begin alike again")
    _kernel_switches(group)
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen")
    group.add_argument("--callback-url", metavar="URL", help="told with a POST when the worker is ready")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that requests may have in `Host`; repeatable (default: on a loopback address localhost, 127.0.0.1, "
        "[::1] and --host, against pages that rebind a name of theirs; elsewhere any)",
    )
    group.add_argument("--max-connections", metavar="N", help="open at once (default: 4 (batch + queue) + 64)")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="key that all but /health want, as `Authorization: Bearer KEY` or, so that a browser can ask for it, as "
        "the password of any user; also from the environment variable REFENGINE_API_KEY",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="the key itself; other users of this machine can see it in the process list"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback on wrong arguments")


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  refengine serve --worker-id $(uuidgen) --device cpu --port 8080 &
  refengine ask "Write a haiku about GPU computing" --temperature 0.7 --seed 42
  refengine ask --chat - <question.txt

Ctrl-C cancels the request and exits with 130; errors are one line and exit code 2."""
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt (or --prompt); `-` reads standard input")
    parser.add_argument("--prompt", metavar="TEXT", help="the same as PROMPT")
    group = parser.add_argument_group("worker")
    group.add_argument("--url", default="http://127.0.0.1:8080", help="of the worker")
    group.add_argument(
        "--api-key", metavar="KEY", help="of the worker (default: $REFENGINE_API_KEY, which no list of processes shows)"
    )
    group.add_argument("--timeout", type=float, default=60.0, metavar="S", help="without any sign of the worker")
    group.add_argument("--deadline", type=float, metavar="S", help="the worker gives up after that time")
    group.add_argument("--retries", type=int, default=0, metavar="N", help="where the worker is full: ask again, later")
    _sampling_arguments(parser)
    group = parser.add_argument_group("answer")
    group.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    group.add_argument(
        "--logprobs",
        type=int,
        default=0,
        metavar="N",
        help="a line a token: its probability, and the N likeliest; to 20",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  refengine bench worker                                 (the packaged model on the CPU; a minute)
  refengine bench worker --model model.gguf --gpu-device 0 --output figures.json
  refengine bench load --clients 64 --seconds 300

Figures go to stdout as histograms and one table, progress to stderr. The exit code is 0 whatever they are;
with --strict it is 1 where one misses its target."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    worker = _command(
        what, "worker", "first token, between tokens, cancel, disconnect, start, shutdown, leaks: beside their targets"
    )
    worker.add_argument("--quick", action="store_true", help="few samples of each: to see that it works")
    load = _command(what, "load", "many streams at once, each compared with what it is alone; /health; memory")
    load.add_argument("--clients", type=int, default=64, metavar="N", help="streams at once")
    load.add_argument("--seconds", type=float, default=30.0, metavar="S", help="how long")
    for command in (worker, load):
        group = command.add_argument_group("the worker that is started")
        group.add_argument("--model", metavar="FILE", help="GGUF file (default: the packaged model)")
        group.add_argument("--device", metavar="NAME", help="cpu, cuda:N or host (default: cpu)")
        group.add_argument("--gpu-device", metavar="N", help="instead: number of the GPU")
        group.add_argument("--serve", default="", metavar="ARGUMENTS", help="more arguments of serve, in one string")
        group = command.add_argument_group("result")
        group.add_argument("--output", metavar="FILE.json", help="also write everything there")
        group.add_argument("--strict", action="store_true", help="exit code 1 where a target is missed")
        group.add_argument("--debug", action="store_true", help="show a traceback on errors")


def _kernel_switches(group: Any) -> None:
    group.add_argument("--no-graphs", action="store_true", help="launch the decode step's kernels one by one")
    group.add_argument(
        "--attention", choices=("flash", "reference"), default="flash", help="reference writes the score matrix"
    )
    group.add_argument("--copy-chunk-kb", default="1024", metavar="KIB", help="of a copy of weights to a GPU")


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("debugging")
    group.add_argument(
        "--break",
        dest="breakpoints",
        action="append",
        default=[],
        metavar="TENSOR",
        help="stop in pdb when tensor TENSOR (Qcur-3) has been made; repeatable",
    )
    group.add_argument("--watch", action="store_true", help="stop at the first tensor with NaN or Inf and name it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 wrong use or unusable input, 130 interrupted.

    `validate`: 0 agrees, 1 diverges, 3 nothing was compared.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code = _function(arguments.command)(arguments) or 0
        sys.stdout.flush()
    except (RefengineError, OSError, MemoryError, UnicodeError) as e:
        if isinstance(e, BrokenPipeError):  # the reader of our output has gone; not an error of ours
            _discard_output()
            return 0
        if arguments.debug:
            raise
        message = str(e) if isinstance(e, RefengineError) else f"{type(e).__name__}: {e}"
        if isinstance(e, UnicodeError):  # standard input or output, in this locale's encoding
            message += "; set PYTHONIOENCODING=utf-8"
        print(f"refengine: error: {one_line(message)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it was the output that failed
            _discard_output()
        return 2
    except bdb.BdbQuit:
        print("refengine: stopped in the debugger", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nrefengine: interrupted", file=sys.stderr)
        return 130
    return code


def _function(command: str) -> Callable[[argparse.Namespace], int | None]:
    """What a command does; imported when it is wanted, since libraries take their time."""
    if command == "validate":
        from refengine.commands_validate import validate

        return validate
    if command == "serve":
        from refengine.commands_serve import serve

        return serve
    if command == "compile":
        from refengine.commands_compile import compile_kernels

        return compile_kernels
    if command == "ask":
        from refengine.commands_ask import ask

        return ask
    if command == "bench":
        from refengine.commands_bench import bench

        return bench
    from refengine import commands

    found: Callable[[argparse.Namespace], int | None] = getattr(commands, command)
    return found


def _discard_output() -> None:
    """Standard output goes nowhere from here on: the interpreter flushes it at exit, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
