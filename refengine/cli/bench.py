"""Implements `refengine bench`: starts a worker, measures it over HTTP, and shows the results with their targets."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from refengine.bench.figures import Figure
from refengine.bench.load import run_load
from refengine.bench.process import WorkerProcess
from refengine.bench.report import record, show
from refengine.bench.suite import QUICK, Plan, Suite
from refengine.cli.console import output_path, say, write_json
from refengine.client.client import Client
from refengine.errors import RequestError
from refengine.worker.options import device_of


def bench(arguments: argparse.Namespace) -> int:
    output = None if arguments.output is None else output_path(arguments.output, ".json")
    device = "cpu"
    if arguments.device is not None or arguments.gpu_device is not None:
        device = device_of(arguments.device, arguments.gpu_device)
    serve = ["--device", device, *shlex.split(arguments.serve)]
    if arguments.model is not None:
        serve += ["--model", arguments.model]
    figures, facts = (_worker if arguments.what == "worker" else _load)(arguments, serve, device)
    health = facts["health"]
    title = f"refengine bench {arguments.what}: {health['model']} ({health['quant_kind']}) on {health['device']}"
    show(figures, Console(highlight=False, width=None if sys.stdout.isatty() else 1000), title)
    if output is not None:
        write_json(output, record(figures, facts, shlex.join(["refengine", *sys.argv[1:]])))
        say(f"{output}: all figures")
    missed = [figure for figure in figures if figure.verdict == "miss"]
    say(f"{len(missed)} targets missed" + "".join(f"; {f.id} {f.name}" for f in missed))
    return 1 if missed and arguments.strict else 0


def _worker(arguments: argparse.Namespace, serve: Sequence[str], device: str) -> tuple[list[Figure], dict[str, Any]]:
    suite = Suite(serve, device != "cpu", QUICK if arguments.quick else Plan(), say)
    return suite.run(), suite.facts


def _load(arguments: argparse.Namespace, serve: Sequence[str], device: str) -> tuple[list[Figure], dict[str, Any]]:
    if arguments.clients < 1 or not arguments.seconds > 0:
        raise RequestError(
            f"--clients {arguments.clients}, --seconds {arguments.seconds}: allowed 1 or more clients, and above 0 s"
        )
    queue = [] if "--max-queue" in serve else ["--max-queue", str(arguments.clients)]
    with WorkerProcess([*serve, *queue]) as worker:
        say(f"ready after {worker.ready():.2f} s")
        with Client(worker.url) as client:
            health = client.health()
        figures, load = run_load(worker, arguments.clients, arguments.seconds, say)
        seconds, code = worker.terminate()
        say(f"ended {seconds:.2f} s after SIGTERM, exit code {code}")
    return figures, {"health": health, "load": load}
