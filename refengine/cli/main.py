"""The `refengine` command: its arguments. Each command is implemented in the module with its name."""

from __future__ import annotations

import argparse
import bdb
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from refengine.cli.arguments import (
    HUB_HELP,
    Help,
    Parser,
    command,
    kernel_switches,
    model_arguments,
    prompt_arguments,
    sampling_arguments,
    trace_arguments,
)
from refengine.cli.worker_arguments import ask_arguments, bench_arguments, serve_arguments
from refengine.errors import RefengineError, needs_extra, one_line

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
  refengine ask "Write a haiku about the sea" --seed 7        (to a running worker)
  refengine bench worker --quick        (measures a worker against its targets)
  refengine bench speed --model model.gguf --compare llama.cpp        (tokens per second, beside llama.cpp)
  refengine compile --arch sm_90a        (when building an image for GPUs; serve then starts in seconds)
  refengine generate "Hello" --model model.gguf --break Qcur-3     (stops in pdb at that tensor)
"""


def build_parser() -> Parser:
    from refengine import __version__

    parser = Parser(prog="refengine", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"refengine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    generate = command(commands, "generate", "continue a prompt, streaming text to stdout and statistics to stderr")
    generate.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt as text")
    model_arguments(generate)
    prompt_arguments(generate)
    sampling_arguments(generate)
    trace_arguments(generate)
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="apply the model's chat template to the prompt (default: if the model has one)",
    )
    generate.add_argument(
        "--echo",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="print the prompt before its continuation (default: unless the chat template is applied)",
    )

    kernel_switches(generate.add_argument_group("kernels on cuda and host, for comparisons"))

    logits = command(commands, "logits", "write the logits of every position of a prompt to an .npz file")
    model_arguments(logits)
    prompt_arguments(logits)
    trace_arguments(logits)
    logits.add_argument(
        "--output",
        required=True,
        metavar="FILE.npz",
        help="output file with `ids` (n,) int64 and `logits` (n, n_vocab) float32 (float64 with --numerics exact64)",
    )

    trace = command(commands, "trace", "write named intermediate tensors of a prompt to a safetensors file")
    model_arguments(trace)
    prompt_arguments(trace)
    trace_arguments(trace)
    trace.add_argument(
        "--output",
        metavar="FILE.safetensors",
        help="output file for the tensors; their manifest is written beside it as FILE.manifest.json",
    )
    trace.add_argument(
        "--filter", default="", metavar="RE", help="regular expression that selects tensors by name (default: all)"
    )
    trace.add_argument("--list", action="store_true", help="print names, shapes and value ranges; write no file")

    validate = command(
        commands,
        "validate",
        "compare with llama.cpp or a dump of another engine, and find the tensor where an error is made first",
    )
    validate.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt (default: a built-in sentence)")
    # Each weight is used in only two passes, so a cache of dequantised weights would cost memory and save little time.
    model_arguments(validate, numerics="llamacpp", cache_mb=0, several=True)
    prompt_arguments(validate, chunk=False)
    group = validate.add_argument_group("the other engine")
    group.add_argument(
        "--peer",
        default="llama.cpp",
        metavar="PEER",
        help="llama.cpp (live, with llama-cpp-python), the folder or manifest of a dump, or refengine itself with "
        "other settings, such as refengine:exact64 or refengine:cuda,f16",
    )
    group.add_argument(
        "--names",
        metavar="FILE",
        help="YAML or JSON list of [regular expression, llama.cpp's name] pairs that maps the names in a dump",
    )
    group.add_argument("--any-model", action="store_true", help="accept a dump that was made with another model file")
    group.add_argument("--threads", type=int, default=2, metavar="N", help="number of threads of llama.cpp")
    group.add_argument(
        "--ubatch", type=int, metavar="N", help="llama.cpp's micro-batch in tokens (default: the whole prompt)"
    )
    group.add_argument("--flash-attention", action="store_true", help="let llama.cpp use its fused attention")
    group.add_argument("--repack", action="store_true", help="let llama.cpp reorder weights for its fastest kernels")
    group = validate.add_argument_group("verdict")
    group.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="RE=NMSE",
        help="allowed error (normalised mean squared error) of the matching tensors, each computed from the other "
        "engine's inputs, instead of the measured floor; repeatable",
    )
    group.add_argument("--all", action="store_true", help="show every tensor")
    group.add_argument("--json", metavar="FILE.json", help="also write the verdict with all numbers to this file")
    group.add_argument(
        "--html", metavar="FILE.html", help="also write the verdict as a single page that a browser can open offline"
    )
    group = validate.add_argument_group("many prompts, many models")
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='file with one prompt per line: "text", [1, 2, 3], or {"id": …, "prompt": "text"}; --model can be given '
        "several times",
    )
    group.add_argument(
        "--output", metavar="FILE.jsonl", help="file to append the results to; a second run skips those already there"
    )
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="number of parallel processes")

    tokenize = command(commands, "tokenize", "print the token ids of a text as JSON, or the text of ids")
    tokenize.add_argument(
        "text", nargs="?", metavar="TEXT", help="the text; with --decode the token ids, as JSON or as 1,2,3"
    )
    tokenize.add_argument("--model", metavar="FILE", help=f"GGUF file; {HUB_HELP} (default: the packaged haiku model)")
    tokenize.add_argument("--decode", action="store_true", help="print the text of ids instead")
    tokenize.add_argument(
        "--special",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add the BOS and EOS tokens that the metadata ask for",
    )
    tokenize.add_argument(
        "--parse-special", action="store_true", help="treat special tokens in the text (<|im_start|>…) as tokens"
    )
    tokenize.add_argument("--debug", action="store_true", help="show a traceback on errors")

    inspect = command(commands, "inspect", "print metadata, tensor types, sizes and the kind of quantisation")
    inspect.add_argument("file", nargs="?", metavar="FILE", help=f"GGUF file; {HUB_HELP} (default: the packaged model)")
    inspect.add_argument("--model", metavar="FILE", help="the same as FILE")
    inspect.add_argument("--json", action="store_true", help="print one JSON object, with every tensor")
    inspect.add_argument("--debug", action="store_true", help="show a traceback on errors")

    compile_kernels = command(
        commands, "compile", "compile the CUDA kernels into $REFENGINE_CACHE before the first start; needs no GPU"
    )
    compile_kernels.add_argument(
        "--arch", action="append", metavar="SM", help="sm_80, sm_86, sm_89, sm_90a or all (default: this machine's GPU)"
    )
    compile_kernels.add_argument(
        "--file", action="append", metavar="NAME", help="compile only this kernel file (repeatable; default: all)"
    )
    compile_kernels.add_argument(
        "--model",
        metavar="FILE",
        help="also compile the kernels that the decode steps of this model have for themselves, which are otherwise "
        f"compiled when it first starts on a GPU; GGUF file; {HUB_HELP}",
    )
    compile_kernels.add_argument(
        "--max-batch", type=int, metavar="N", default=8, help="with --model: serve's --max-batch (default: 8)"
    )
    compile_kernels.add_argument(
        "--multiprocessors", type=int, metavar="N", help="with --model: those of the GPU (default: this machine's GPU)"
    )
    compile_kernels.add_argument(
        "--jobs", type=int, metavar="N", help="number of parallel processes (default: one per core)"
    )
    compile_kernels.add_argument("--debug", action="store_true", help="show a traceback on errors")

    header = command(
        commands, "dump-header", "print the path of a C++ header that writes an engine's tensors for `validate --peer`"
    )
    header.add_argument("--output", metavar="FILE.h", help="copy the header to this file instead of printing its path")
    header.add_argument("--debug", action="store_true", help="show a traceback on errors")

    serve = command(commands, "serve", "serve one model on one device over HTTP")
    serve_arguments(serve)

    ask = command(commands, "ask", "send a prompt to a worker, streaming its answer to stdout and statistics to stderr")
    ask_arguments(ask)

    bench = command(commands, "bench", "measure a worker over HTTP as its clients see it, or the speed of the engine")
    bench_arguments(bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 success, 2 wrong arguments or unusable input, 130 interrupted.

    For `validate`: 0 agrees, 1 diverges, 3 nothing was compared. For `bench`: 1 if targets were missed or sizes became
    slower, where the arguments ask for that.
    """
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse(arguments.command, unknown)
    try:
        code = _function(arguments.command)(arguments) or 0
        sys.stdout.flush()
    except (RefengineError, OSError, MemoryError, UnicodeError) as e:
        if isinstance(e, BrokenPipeError):  # the reader of our output is gone, which is no error
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
        except OSError:  # standard output itself has failed
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
    """The function that implements a command. It is imported only here, because its libraries load slowly."""
    if command == "validate":
        from refengine.cli.validate import validate

        return validate
    if command == "serve":
        return _serve
    if command == "compile":
        from refengine.cli.compile import compile_kernels

        return compile_kernels
    if command == "ask":
        with needs_extra("client", "refengine ask"):
            from refengine.cli.ask import ask

        return ask
    if command == "bench":
        return _bench
    if command == "dump-header":
        from refengine.cli.dump_header import dump_header

        return dump_header
    function: Callable[[argparse.Namespace], int | None] = getattr(import_module(f"refengine.cli.{command}"), command)
    return function


def _serve(arguments: argparse.Namespace) -> int:
    from refengine.worker.options import device_of
    from refengine.worker.signals import ending_on_signals

    device = device_of(arguments.device, arguments.gpu_device)
    with ending_on_signals(arguments.worker_id, arguments.model or "packaged", device):
        with needs_extra("serve", "refengine serve"):
            from refengine.cli.serve import serve

        return serve(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.what == "speed":
        from refengine.cli.bench_speed import bench_speed

        return bench_speed(arguments)
    with needs_extra("serve", "refengine bench"):
        from refengine.cli.bench import bench

    return bench(arguments)


def _discard_output() -> None:
    """Redirect standard output to /dev/null: the interpreter flushes it at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
