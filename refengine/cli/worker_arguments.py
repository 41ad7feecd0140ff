"""Arguments of the commands that have to do with a worker: serve, ask, bench."""

from __future__ import annotations

import argparse

from refengine.cli.arguments import HUB_HELP, command, kernel_switches, sampling_arguments


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers stay text here: `commands_serve` checks them, and says what is allowed."""
    parser.epilog = """routes: POST /execute (answers with server-sent events), POST /cancel, POST /shutdown,
GET /health, GET /metrics (Prometheus); for OpenAI's clients POST /v1/completions and /v1/chat/completions,
GET /v1/models, /v1/models/NAME; POST /tokenize and /detokenize, GET /tokenizer_info; GET / (a page), /docs,
/openapi.json.
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
    kernel_switches(group)
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


def ask_arguments(parser: argparse.ArgumentParser) -> None:
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
    sampling_arguments(parser)
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


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  refengine bench worker                                 (the packaged model on the CPU; a minute)
  refengine bench worker --model model.gguf --gpu-device 0 --output figures.json
  refengine bench load --clients 64 --seconds 300

Figures go to stdout as histograms and one table, progress to stderr. The exit code is 0 whatever they are;
with --strict it is 1 where one misses its target."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    worker = command(
        what, "worker", "first token, between tokens, cancel, disconnect, start, shutdown, leaks: beside their targets"
    )
    worker.add_argument("--quick", action="store_true", help="few samples of each: to see that it works")
    load = command(what, "load", "many streams at once, each compared with what it is alone; /health; memory")
    load.add_argument("--clients", type=int, default=64, metavar="N", help="streams at once")
    load.add_argument("--seconds", type=float, default=30.0, metavar="S", help="how long")
    for measured in (worker, load):
        group = measured.add_argument_group("the worker that is started")
        group.add_argument("--model", metavar="FILE", help="GGUF file (default: the packaged model)")
        group.add_argument("--device", metavar="NAME", help="cpu, cuda:N or host (default: cpu)")
        group.add_argument("--gpu-device", metavar="N", help="instead: number of the GPU")
        group.add_argument("--serve", default="", metavar="ARGUMENTS", help="more arguments of serve, in one string")
        group = measured.add_argument_group("result")
        group.add_argument("--output", metavar="FILE.json", help="also write everything there")
        group.add_argument("--strict", action="store_true", help="exit code 1 where a target is missed")
        group.add_argument("--debug", action="store_true", help="show a traceback on errors")
