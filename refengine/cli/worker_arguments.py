"""The arguments of the commands that start or use a worker: serve, ask, bench."""

from __future__ import annotations

import argparse

from refengine.cli.arguments import HUB_HELP, command, kernel_switches, sampling_arguments


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`. Numbers stay text here: `cli/serve.py` converts and checks them."""
    parser.epilog = """routes: POST /execute (answers with server-sent events), POST /cancel, POST /shutdown,
GET /health, GET /metrics (Prometheus); for OpenAI's clients POST /v1/completions and /v1/chat/completions,
GET /v1/models, /v1/models/NAME; POST /tokenize and /detokenize, GET /tokenizer_info; GET / (a page), /docs,
/openapi.json.
SIGTERM and SIGINT stop the worker in the same way as /shutdown.

  curl -N http://127.0.0.1:8080/execute -d '{"job_id": "1", "prompt": "Write a haiku about GPU computing"}'

exit codes: 0 after a shutdown, 1 if the start fails (the log says why), 2 for wrong arguments"""
    group = parser.add_argument_group("required")
    group.add_argument("--worker-id", required=True, metavar="UUID", help="identifies this worker in its log")
    group.add_argument("--port", required=True, metavar="P", help="TCP port to listen on, 1024 to 65535")
    group.add_argument(
        "--gpu-device", metavar="N", help="number of the GPU to run on; the worker never falls back to the CPU"
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help="instead of --gpu-device: cuda:N, cpu, or host (the CUDA kernels on the CPU, for tests)",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="FILE", help=f"GGUF file; {HUB_HELP} (default: the packaged model, which writes haiku)"
    )
    group.add_argument(
        "--kv-cache-size-mb", metavar="MIB", help="size of the KV cache in MiB (default: as much as memory allows)"
    )
    group.add_argument(
        "--on-shortage",
        choices=("preempt", "fail"),
        default="preempt",
        help="what happens when a running request needs a KV cache block and none is free: preempt stops the youngest "
        "request and recomputes it later; fail ends the request with an error",
    )
    group.add_argument(
        "--residency-check-sec",
        default="60",
        metavar="S",
        help="seconds between two checks that the model is still in device memory",
    )
    group = parser.add_argument_group("limits")
    group.add_argument("--max-tokens-in", metavar="N", help="maximum prompt tokens (default: the context length)")
    group.add_argument("--max-tokens-out", default="2048", metavar="N", help="maximum generated tokens, up to 2048")
    group.add_argument(
        "--inference-timeout-sec",
        default="300",
        metavar="S",
        help="maximum time of a request in seconds, including its time in the queue",
    )
    group.add_argument(
        "--shutdown-grace-sec",
        default="2.5",
        metavar="S",
        help="seconds that running requests have to finish at a shutdown before they are cancelled",
    )
    group.add_argument(
        "--heartbeat-sec", default="15", metavar="S", help="send a comment in a stream after this many silent seconds"
    )
    group.add_argument(
        "--metrics-event-sec",
        default="0",
        metavar="S",
        help="seconds between two `metrics` events in a stream of /execute; 0 sends none",
    )
    group.add_argument("--max-batch", default="8", metavar="N", help="maximum requests that run at the same time")
    group.add_argument(
        "--max-step-tokens",
        metavar="N",
        help="maximum tokens of one step; a smaller value lets a long prompt delay other streams less (default: 512; "
        "128 on the CPU)",
    )
    group.add_argument(
        "--max-queue",
        default="64",
        metavar="N",
        help="maximum requests that wait in the queue; further requests get HTTP status 503",
    )
    group = parser.add_argument_group("disabling features, for comparisons")
    group.add_argument("--no-batching", action="store_true", help="run one request at a time")
    group.add_argument(
        "--no-prefix-cache", action="store_true", help="do not reuse KV cache blocks for equal beginnings of prompts"
    )
    kernel_switches(group)
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address or host name to listen on")
    group.add_argument("--callback-url", metavar="URL", help="URL that gets a POST request when the worker is ready")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional name allowed in a request's `Host` header; repeatable (default: on a loopback address only "
        "localhost, 127.0.0.1, [::1] and --host, against DNS rebinding by web pages; on other addresses any name)",
    )
    group.add_argument(
        "--max-connections", metavar="N", help="maximum open connections (default: 4 (batch + queue) + 64)"
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the key that every route except /health requires, as `Authorization: Bearer KEY` or, for "
        "browsers, as the password of any user; the environment variable REFENGINE_API_KEY can hold the key instead",
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
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt; `-` reads it from standard input")
    parser.add_argument("--prompt", metavar="TEXT", help="the same as PROMPT")
    group = parser.add_argument_group("worker")
    group.add_argument("--url", default="http://127.0.0.1:8080", help="address of the worker")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="the worker's key (default: $REFENGINE_API_KEY, which other users cannot see in the process list)",
    )
    group.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="give up after this many seconds without any data"
    )
    group.add_argument(
        "--deadline", type=float, metavar="S", help="seconds after which the worker ends the request with an error"
    )
    group.add_argument(
        "--retries", type=int, default=0, metavar="N", help="how often to try again later if the worker's queue is full"
    )
    sampling_arguments(parser)
    group = parser.add_argument_group("answer")
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    group.add_argument(
        "--logprobs",
        type=int,
        default=0,
        metavar="N",
        help="print one line per token with its probability and the N most likely tokens, up to 20",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  refengine bench worker                                 (the packaged model on the CPU; a minute)
  refengine bench worker --model model.gguf --gpu-device 0 --output figures.json
  refengine bench load --clients 64 --seconds 300
  refengine bench speed --model model.gguf --compare llama.cpp     (the engine itself, without a worker)

Histograms and tables of the results go to stdout, progress goes to stderr. The exit code is 0 whatever the results are;
with --strict it is 1 if a result of a worker misses its target, and with --baseline if the engine became slower."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    worker = command(
        what,
        "worker",
        "measure the times of tokens, cancel, disconnect, start and shutdown, and memory leaks, against their targets",
    )
    worker.add_argument("--quick", action="store_true", help="take few samples, to check that the benchmark works")
    load = command(
        what, "load", "run many streams at once; compare each with its result when run alone; watch /health and memory"
    )
    load.add_argument("--clients", type=int, default=64, metavar="N", help="number of streams at the same time")
    load.add_argument("--seconds", type=float, default=30.0, metavar="S", help="duration of the load in seconds")
    _speed_arguments(command(what, "speed", "measure tokens per second of the engine, beside llama.cpp if wanted"))
    for measured in (worker, load):
        group = measured.add_argument_group("the worker that is started")
        group.add_argument("--model", metavar="FILE", help="GGUF file (default: the packaged model)")
        group.add_argument("--device", metavar="NAME", help="cpu, cuda:N or host (default: cpu)")
        group.add_argument("--gpu-device", metavar="N", help="instead of --device: number of the GPU")
        group.add_argument(
            "--serve", default="", metavar="ARGUMENTS", help="additional arguments for `serve`, in one string"
        )
        group = measured.add_argument_group("result")
        group.add_argument("--output", metavar="FILE.json", help="also write all results to this file")
        group.add_argument("--strict", action="store_true", help="exit with code 1 if a target is missed")
        group.add_argument("--debug", action="store_true", help="show a traceback on errors")


def _speed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """examples:
  refengine bench speed --model model.gguf                                        (on the CPU; about a minute)
  refengine bench speed --model model.gguf --device cuda --compare llama.cpp --html speed.html
  refengine bench speed --model model.gguf --device cuda --profile --json now.json --baseline before.json

Each engine has the model in a process of its own. Every size is measured in turns (refengine, llama.cpp, refengine, …),
after one turn each that does not count; the engine that waits does nothing. Sizes that do not fit the model's context
or the memory are left out, and the output says so.

Defaults on the CPU: --prompts 128,512 --depths 0,512 --streams 1,4,8 --tokens 16 --rounds 3
Defaults on a GPU:   --prompts 512,2048 --depths 0,512,3500 --streams 1,8,32,64 --tokens 128 --rounds 5"""
    group = parser.add_argument_group("what runs")
    group.add_argument(
        "--model",
        metavar="FILE",
        action="append",
        help=f"GGUF file; {HUB_HELP} (default: the packaged model); repeatable",
    )
    group.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N; host, the kernels on the CPU, is for tests"
    )
    group.add_argument(
        "--numerics",
        choices=("exact", "exact64", "llamacpp", "fast"),
        help="refengine's numerics (default: fast on cuda, else exact)",
    )
    group.add_argument(
        "--compare",
        metavar="llama.cpp",
        help="measure llama.cpp as well, on the same file, device and sizes, in alternating rounds; needs the extra "
        "`validate`, on a GPU built with CUDA",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads of either engine on the CPU (default: all usable processors)"
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument("--prompts", metavar="N,…", help="sizes of prompts in tokens")
    group.add_argument("--depths", metavar="N,…", help="tokens in the KV cache before one stream is decoded")
    group.add_argument(
        "--streams", metavar="N,…", help="numbers of streams that are decoded together, at the shortest depth"
    )
    group.add_argument("--tokens", type=int, metavar="N", help="decode steps of one sample")
    group.add_argument("--rounds", type=int, metavar="N", help="samples of each size and engine")
    group.add_argument("--chunk", type=int, metavar="N", help="prompt tokens per forward pass (default: 512)")
    group.add_argument(
        "--profile",
        action="store_true",
        help="also show the time of a decode step by kernel, or on the CPU by operation; such steps take longer",
    )
    group = parser.add_argument_group("result")
    group.add_argument("--json", metavar="FILE.json", help="also write all samples, with machine, versions and command")
    group.add_argument(
        "--html", metavar="FILE.html", help="also write one page with plots, to open offline; needs the extra `bench`"
    )
    group.add_argument(
        "--baseline",
        metavar="OLD.json",
        help="compare with an earlier --json: name the sizes whose median has fallen by more than both runs vary, and "
        "exit with code 1 if there are any",
    )
    group.add_argument("--debug", action="store_true", help="show a traceback on errors")
