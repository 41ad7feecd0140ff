"""The options of a worker, checked. Every error says what was given and what is allowed."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from refengine.errors import RequestError

MAX_TOKENS_OUT = 2048
ON_SHORTAGE = ("preempt", "fail")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class WorkerOptions:
    """The options of a worker. The constructor checks them and raises RequestError.

    None means that the value is derived from the model and the device.
    device: `cpu`, `host` or `cuda:N`. There is no `auto`, because a worker never chooses another device by itself.
    """

    worker_id: str
    model: Path | str  # a file, or a name on the hub
    device: str
    port: int
    host: str = "127.0.0.1"
    max_tokens_in: int | None = None
    max_tokens_out: int = MAX_TOKENS_OUT
    inference_timeout_sec: float = 300.0
    kv_cache_size_mb: int | None = None
    max_batch: int = 8
    max_queue: int = 64
    max_step_tokens: int | None = None
    on_shortage: str = "preempt"
    batching: bool = True
    prefix_cache: bool = True
    graphs: bool = True
    ahead: bool = True
    attention: str = "flash"
    copy_chunk_kb: int = 1024
    residency_check_sec: float = 60.0
    shutdown_grace_sec: float = 2.5  # for live jobs; the whole shutdown then takes at most 5 s
    heartbeat_sec: float = 15.0  # a comment is sent in a stream that has been silent for this long
    metrics_event_sec: float = 0.0  # between two `metrics` events in a stream of /execute; 0: no such events
    callback_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_connections: int | None = None
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_uuid(self.worker_id)
        if re.fullmatch(r"cpu|host|cuda:\d{1,4}", self.device) is None:
            raise RequestError(
                f"--device: given {self.device!r}, allowed cpu, host, cuda or cuda:N (or --gpu-device N)"
            )
        if not self.host:
            raise RequestError("--host: given nothing, allowed an address or a host name")
        _check_range("--port", self.port, 1024, 65535)
        if self.max_tokens_in is not None:
            _check_range("--max-tokens-in", self.max_tokens_in, 1, 1 << 24)
        _check_range("--max-tokens-out", self.max_tokens_out, 1, MAX_TOKENS_OUT)
        _check_range("--inference-timeout-sec", self.inference_timeout_sec, 0.001, 86400)
        if self.kv_cache_size_mb is not None:
            _check_range("--kv-cache-size-mb", self.kv_cache_size_mb, 1, 1 << 22)
        _check_range("--max-batch", self.max_batch, 1, 1024)
        if self.max_step_tokens is not None:
            _check_range("--max-step-tokens", self.max_step_tokens, 1, 1 << 20)
        _check_range("--max-queue", self.max_queue, 0, 100_000)
        if self.on_shortage not in ON_SHORTAGE:
            raise RequestError(f"--on-shortage: given {self.on_shortage!r}, allowed {' or '.join(ON_SHORTAGE)}")
        _check_range("--copy-chunk-kb", self.copy_chunk_kb, 1, 1 << 20)
        _check_range("--residency-check-sec", self.residency_check_sec, 0.1, 86400)
        _check_range("--heartbeat-sec", self.heartbeat_sec, 0.05, 3600)
        _check_range("--metrics-event-sec", self.metrics_event_sec, 0, 3600)
        _check_range("--shutdown-grace-sec", self.shutdown_grace_sec, 0, 3600)
        if self.callback_url is not None:
            _check_url(self.callback_url)
        if self.api_key is not None and re.fullmatch(r"[!-~]{8,512}", self.api_key) is None:
            raise RequestError(
                f"the API key: given {len(self.api_key)} characters, allowed 8 to 512 of printable ASCII without spaces"
            )
        if self.max_connections is not None:
            _check_range("--max-connections", self.max_connections, 1, 1_000_000)
        for name in self.allowed_hosts:
            if re.fullmatch(r"[A-Za-z0-9._:-]{1,255}", name) is None:
                raise RequestError(
                    f"--allowed-host: given {name[:60]!r}, allowed a host name or address without a port"
                )

    @property
    def connections(self) -> int:
        """The number of connections that may be open. The default allows several per client."""
        return self.max_connections or 4 * (self.max_batch + self.max_queue) + 64

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names that a `Host` header may contain; None: any name.

        On a loopback address names are restricted, so that no web page can reach the worker by DNS rebinding.
        """
        if not self.allowed_hosts and not _is_loopback(self.host):
            return None
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, self.host, *self.allowed_hosts))

    @cached_property
    def url(self) -> str:
        """The URL at which others reach this worker.

        If it listens on all addresses, the URL has the first allowed host or the machine's own address.
        """
        host = self.host
        if _is_unspecified(host):
            host = self.allowed_hosts[0] if self.allowed_hosts else _own_address(host, self.callback_url)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def device_of(device: str | None, gpu_device: str | None) -> str:
    """The device's name, from `--device` or `--gpu-device`. Raises RequestError unless exactly one is given."""
    if (device is None) == (gpu_device is None):
        given = "neither" if device is None else "both"
        raise RequestError(
            f"--gpu-device N and --device: given {given}, allowed exactly one; use --device cpu to run on the CPU"
        )
    if device is not None:
        return "cuda:0" if device == "cuda" else device
    return f"cuda:{integer('--gpu-device', str(gpu_device), 0, 9999)}"


def integer(name: str, text: str, low: int, high: int) -> int:
    """Parse an argument that is a whole number from low to high. Raises RequestError."""
    if re.fullmatch(r"[+-]?\d{1,18}", text) is None:
        raise RequestError(f"{name}: given {text[:40]!r}, allowed a whole number from {low} to {high}")
    value = int(text)
    _check_range(name, value, low, high)
    return value


def seconds(name: str, text: str) -> float:
    """Parse an argument that is a number of seconds. Raises RequestError."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{name}: given {text[:40]!r}, allowed a number of seconds") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _own_address(listening: str, callback_url: str | None) -> str:
    """This machine's address on the route to the callback's host or to the internet; its host name if there is none.

    Connects unbound UDP sockets, which sends no packet.
    """
    families = {6: socket.AF_INET6, 4: socket.AF_INET} if ":" in listening else {4: socket.AF_INET}
    called = [] if callback_url is None else [str(urlsplit(callback_url).hostname)]
    for target in (*called, "2001:db8::1", "192.0.2.1"):  # the last two are reserved for documentation
        with contextlib.suppress(OSError, ValueError, KeyError):  # no route; a host name; the other address family
            family = families[ipaddress.ip_address(target).version]
            with socket.socket(family, socket.SOCK_DGRAM) as unconnected:
                unconnected.connect((target, 9))
                return str(unconnected.getsockname()[0])
    return socket.gethostname()


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(f"{name}: given {value}, allowed {low} to {high}")


def _check_uuid(text: str) -> None:
    try:
        well_formed = str(uuid.UUID(text)) == text.lower()
    except ValueError:
        well_formed = False
    if not well_formed:
        raise RequestError(
            f"--worker-id: given {text[:60]!r}, allowed a UUID such as 123e4567-e89b-12d3-a456-426614174000"
        )


def _check_url(text: str) -> None:
    try:
        parts = urlsplit(text)
        well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise RequestError(f"--callback-url: given {text[:100]!r}, allowed an http:// or https:// URL")
