"""Implements `refengine serve`: converts and checks the arguments, and runs a worker until it is told to stop."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from refengine.errors import RequestError
from refengine.hub.names import parse
from refengine.model import PACKAGED_MODEL
from refengine.worker.options import WorkerOptions, device_of, integer, seconds
from refengine.worker.server import serve as serve_worker

KEY_VARIABLE = "REFENGINE_API_KEY"
MAX_KEY_FILE = 4096  # bytes


def serve(arguments: argparse.Namespace) -> int:
    return serve_worker(options_of(arguments))


def options_of(arguments: argparse.Namespace) -> WorkerOptions:
    """The worker's options from the arguments. Raises RequestError for the first argument that is not allowed."""

    def optional(name: str, text: str | None, low: int, high: int) -> int | None:
        return None if text is None else integer(name, text, low, high)

    return WorkerOptions(
        worker_id=arguments.worker_id,
        device=device_of(arguments.device, arguments.gpu_device),
        port=integer("--port", arguments.port, 1024, 65535),
        host=arguments.host,
        max_tokens_in=optional("--max-tokens-in", arguments.max_tokens_in, 1, 1 << 24),
        max_tokens_out=integer("--max-tokens-out", arguments.max_tokens_out, 1, 2048),
        inference_timeout_sec=seconds("--inference-timeout-sec", arguments.inference_timeout_sec),
        kv_cache_size_mb=optional("--kv-cache-size-mb", arguments.kv_cache_size_mb, 1, 1 << 22),
        max_batch=integer("--max-batch", arguments.max_batch, 1, 1024),
        max_queue=integer("--max-queue", arguments.max_queue, 0, 100_000),
        max_step_tokens=optional("--max-step-tokens", arguments.max_step_tokens, 1, 1 << 20),
        on_shortage=arguments.on_shortage,
        batching=not arguments.no_batching,
        prefix_cache=not arguments.no_prefix_cache,
        graphs=not arguments.no_graphs,
        ahead=not arguments.no_ahead,
        attention=arguments.attention,
        copy_chunk_kb=integer("--copy-chunk-kb", arguments.copy_chunk_kb, 1, 1 << 20),
        residency_check_sec=seconds("--residency-check-sec", arguments.residency_check_sec),
        shutdown_grace_sec=seconds("--shutdown-grace-sec", arguments.shutdown_grace_sec),
        heartbeat_sec=seconds("--heartbeat-sec", arguments.heartbeat_sec),
        metrics_event_sec=seconds("--metrics-event-sec", arguments.metrics_event_sec),
        callback_url=arguments.callback_url,
        api_key=_api_key(arguments.api_key, arguments.api_key_file),
        max_connections=optional("--max-connections", arguments.max_connections, 1, 1_000_000),
        allowed_hosts=tuple(arguments.allowed_host),
        model=_model(arguments.model),
    )


def _model(name: str | None) -> Path | str:
    """The model's path, or its name on the hub, whose file the worker downloads. Raises HubError for a bad hub name."""
    if name is None:
        return PACKAGED_MODEL
    return Path(name) if parse(name) is None else name


def _api_key(key: str | None, file: str | None) -> str | None:
    """The API key, from an option or, if neither is given, from the environment variable. Raises RequestError."""
    if key is not None and file is not None:
        raise RequestError("--api-key and --api-key-file: given both, allowed only one of them")
    if file is None:
        return os.environ.get(KEY_VARIABLE) if key is None else key
    try:
        with open(file, "rb") as opened:
            return opened.read(MAX_KEY_FILE).decode().strip()
    except OSError as e:
        raise RequestError(f"--api-key-file: {file} cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise RequestError(f"--api-key-file: {file} is not a text file") from None
