"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

HUB_HELP = """or hf:OWNER/REPO[@REVISION][:QUANT or :FILE.gguf], which is downloaded into the cache of huggingface_hub
(HF_HOME, HF_TOKEN, HF_HUB_OFFLINE); QUANT is a part of the file's name, such as Q4_K_M; without QUANT and FILE, the
repo's only model or its only Q4_K_M is taken"""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option, unless it has none or its help text describes it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default in ([], "", False) or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Suggests the nearest command or option for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        match = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if match:
            message += _suggestion(match[1], re.findall(r"[\w-]+", match[2]))
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def refuse(self, command: str, unknown: Sequence[str]) -> NoReturn:
        """Exit with an error about arguments that a command does not have."""
        (commands,) = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parser: argparse.ArgumentParser = commands.choices[command]
        options = [option for action in parser._actions for option in action.option_strings]
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        hint = _suggestion(wrong.partition("=")[0], options)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _suggestion(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def command(commands: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text, formatter_class=Help, allow_abbrev=False
    )
    return parser


def model_arguments(
    parser: argparse.ArgumentParser, numerics: str | None = None, cache_mb: int | None = None, several: bool = False
) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="FILE",
        action="append" if several else "store",
        help=f"GGUF file (the first part of a split file); {HUB_HELP} (default: the packaged model, which writes "
        "haiku)",
    )
    group.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda, cuda:N, auto (a GPU if one is usable; prints the choice and the reason), or host (the CUDA "
        "kernels on the CPU, for tests and debuggers); an explicit device never falls back to another",
    )
    group.add_argument(
        "--numerics",
        default=numerics,
        choices=("exact", "exact64", "llamacpp", "fast"),
        help="exact: float32 on the dequantised weights; exact64: the same in float64; llamacpp: the same rounding as "
        "llama.cpp's CPU backend; fast: the same rounding as the GPU kernels, which run it on cuda and host "
        f"(default: {numerics or 'fast on cuda and host, else exact'})",
    )
    group.add_argument(
        "--kv-type",
        choices=("f16", "f32", "f64"),
        help="type of the KV cache (default: f16 for llamacpp and fast, f32 for exact, f64 for exact64)",
    )
    group.add_argument("--ctx", type=int, metavar="N", help="context length in tokens (default: the model's)")
    group.add_argument(
        "--cpu-cache-mb",
        type=int,
        default=cache_mb,
        metavar="MIB",
        help="how many MiB of dequantised weights to keep; 0 dequantises at every use"
        f" (default: {'half of the memory' if cache_mb is None else cache_mb})",
    )
    group.add_argument("--debug", action="store_true", help="show a traceback on errors")


def prompt_arguments(parser: argparse.ArgumentParser, chunk: bool = True) -> None:
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the prompt as text; @FILE reads a file, - reads standard input, which is also read if it is a pipe and "
        "no prompt is given",
    )
    group.add_argument(
        "--ids", metavar="1,2,3", help="the prompt as token ids, which are used unchanged; JSON is allowed: [1, 2, 3]"
    )
    if chunk:
        group.add_argument("--chunk", type=int, default=512, metavar="N", help="prompt tokens per forward pass")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="maximum number of generated tokens")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 to 2; 0 is greedy")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="P", help="above 0, up to 2; 1 is off")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens; 0 is off")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the most likely tokens until their probabilities sum up to P; 1 is off",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens that are at least P times as likely as the most likely one; 0 is off",
    )
    group.add_argument("--seed", type=int, metavar="N", help="0 to 2^64 - 1 (default: random, and printed)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; can be given up to 4 times"
    )


def kernel_switches(group: Any) -> None:
    group.add_argument(
        "--no-graphs", action="store_true", help="launch the decode step's kernels one by one, without CUDA graphs"
    )
    group.add_argument(
        "--no-ahead", action="store_true", help="launch a decode step only when the tokens of the one before are read"
    )
    group.add_argument(
        "--attention",
        choices=("flash", "reference"),
        default="flash",
        help="flash: the fused kernel; reference: array code that writes the score matrix",
    )
    group.add_argument(
        "--copy-chunk-kb", default="1024", metavar="KIB", help="size of one copy of weights to a GPU, in KiB"
    )


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("debugging")
    group.add_argument(
        "--break",
        dest="breakpoints",
        action="append",
        default=[],
        metavar="TENSOR",
        help="stop in the debugger (pdb, or the one in PYTHONBREAKPOINT) after tensor TENSOR (such as Qcur-3) has been "
        "computed; repeatable",
    )
    group.add_argument("--watch", action="store_true", help="stop at the first tensor with NaN or Inf and name it")
