"""Random requests that no HTTP library would send. They are sent on a bare socket; the response statuses are read."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

BODIES: dict[str, dict[str, Any]] = {
    "/execute": {"job_id": "raw", "prompt": "Write a haiku", "max_tokens": 3, "seed": 1},
    "/cancel": {"job_id": "raw"},
    "/v1/completions": {"prompt": "Write a haiku", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Write a haiku"}], "max_tokens": 3},
    "/tokenize": {"content": "Write a haiku"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
PATHS = [*BODIES, "/health", "/metrics", "/openapi.json", "/v1/models", "/", "/docs", "/nothing", "/tokenizer_info"]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "", "G\x00T"]
ODD = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    "[" * 3000,
    '{"a":' * 500,
    "\x00",
    "null",
    "-0",
    "1E-400",
    "{}",
]
WAIT_S = 0.03  # for an answer to what needs none
ANSWER_S = 30.0


def head(rng: random.Random, path: str, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def with_body(rng: random.Random, path: str, body: bytes) -> bytes:
    return head(rng, path, f"Content-Length: {len(body)}", "Content-Type: application/json") + body


def valid(rng: random.Random) -> bytes:
    path = rng.choice(list(BODIES))
    body = {**BODIES[path]}
    if "job_id" in body:
        body["job_id"] = f"raw{rng.getrandbits(64)}"
    return with_body(rng, path, json.dumps(body).encode())


def garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([1, 10, 100, 5000])) + b"\r\n\r\n"


def truncated(rng: random.Random) -> bytes:
    data = valid(rng)
    return data[: rng.randrange(len(data))]


def flipped(rng: random.Random) -> bytes:
    data = bytearray(valid(rng))
    for _ in range(rng.choice([1, 2, 8])):
        at = rng.randrange(len(data))
        how = rng.randrange(4)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            del data[at]
        elif how == 2:
            data.insert(at, rng.randrange(256))
        else:
            data[at:at] = data[at : at + rng.randrange(20)]
    return bytes(data)


def bad_json(rng: random.Random) -> bytes:
    """A valid body with one element that JSON does not have, or that is in the wrong place."""
    path = rng.choice(list(BODIES))
    text = json.dumps(BODIES[path])
    at = rng.randrange(len(text))
    how = rng.randrange(5)
    if how == 0:
        text = text[:at] + rng.choice(ODD) + text[at:]
    elif how == 1:
        text = text[:at]
    elif how == 2:
        name = rng.choice(list(BODIES[path]))
        text = re.sub(rf'"{name}": [^,}}]*', lambda _: f'"{name}": {rng.choice(ODD)}', text)
    elif how == 3:
        text = text[:-1] + ", " + text[1:]  # each name twice
    else:
        text = rng.choice(ODD)
    return with_body(rng, path, text.encode("utf-8", "replace"))


def bad_utf8(rng: random.Random) -> bytes:
    path = rng.choice(list(BODIES))
    body = json.dumps(BODIES[path]).encode()
    at = rng.randrange(len(body))
    bad = rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
    return with_body(rng, path, body[:at] + bad + body[at:])


def huge_head(rng: random.Random) -> bytes:
    size = rng.choice([5_000, 20_000, 100_000])
    how = rng.randrange(4)
    if how == 0:
        return head(rng, "/" + "x" * size, method="GET")
    if how == 1:
        return head(rng, "/health", "X: " + "y" * size, method="GET")
    if how == 2:
        return head(rng, "/health", *(f"X{i}: {i}" for i in range(size // 20)), method="GET")
    return b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * size


def chunks(rng: random.Random) -> bytes:
    """A body in chunked encoding, valid or with an error."""
    path = rng.choice(list(BODIES))
    body = json.dumps(BODIES[path]).encode()
    cut = rng.randrange(1, len(body))
    parts = [b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:cut], body[cut:])] + [b"0\r\n\r\n"]
    fault = rng.randrange(8)
    if fault < 6:
        at = rng.randrange(len(parts))
        parts[at] = [
            b"zz\r\n" + body + b"\r\n",
            b"-1\r\n\r\n",
            b"f" * 30 + b"\r\n",
            b"%x\r\n%s" % (len(body) + 5, body),
            b"%x;ext=%s\r\n%s\r\n" % (len(body), b"e" * 3000, body),
            b"0\r\nTrailer: " + b"t" * 20_000 + b"\r\n\r\n",
        ][fault]
    return head(rng, path, "Transfer-Encoding: chunked") + b"".join(parts)


def smuggled(rng: random.Random) -> bytes:
    """Requests whose length is ambiguous (request smuggling)."""
    inner = b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n"
    size = len(inner)
    shapes = [
        (["Content-Length: 0", f"Content-Length: {size}"], inner),
        ([f"Content-Length: {size}", "Transfer-Encoding: chunked"], b"0\r\n\r\n" + inner),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n" + inner),
        (["Transfer-Encoding: xchunked"], b"0\r\n\r\n" + inner),
        (["Transfer-Encoding:\x0bchunked"], b"0\r\n\r\n" + inner),
        (["Transfer-Encoding : chunked"], b"0\r\n\r\n" + inner),
        ([f"Content-Length: {size}, {size}"], inner),
        ([f"Content-Length: 0{size}"], inner),
        (["Content-Length: -1"], inner),
        (["Content-Length: 1_0"], inner),
        (["X: a\r\n Content-Length: 10"], inner),
        (["X: a\nContent-Length: 10"], inner),
        (["X: a\rContent-Length: 10"], inner),
        (["Expect: 100-continue", "Content-Length: 2"], b"{}"),
        (["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"], b""),
        (["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ]
    headers, body = rng.choice(shapes)
    return head(rng, rng.choice(PATHS), *headers) + body


def pipelined(rng: random.Random) -> bytes:
    parts = [rng.choice([valid, garbage, truncated, flipped, chunks])(rng) for _ in range(rng.randrange(2, 6))]
    return b"".join(parts).replace(b"Connection: close\r\n", b"")


def odd_request(rng: random.Random) -> bytes:
    """Requests with methods, targets, versions and headers of all kinds."""
    targets = [
        *PATHS,
        "*",
        "http://evil.test/health",
        "//",
        "/%00",
        "/%ff",
        "/health?" + "a=b&" * 50,
        "/../health",
        "é",
    ]
    headers = [
        "Origin: http://evil.test",
        "Host: evil.test",
        "X-Deadline: " + rng.choice(["nan", "-1", "1e400", "2030", "x" * 500, "2001-01-01T00:00:00Z"]),
        "Authorization: " + rng.choice(["Basic !", "Bearer", "Basic " + "A" * 500]),
        "Content-Type: " + rng.choice(["text/plain", "multipart/form-data", "application/json; charset=utf-7"]),
        "Content-Encoding: gzip",
        "Range: bytes=0-0",
        "Accept: nothing/at-all",
        "Cookie: " + "c" * 3000,
        "X-é: ü",
        "Empty:",
    ]
    data = head(rng, rng.choice(targets), *rng.sample(headers, rng.randrange(4)), method=rng.choice(METHODS))
    return data.replace(
        b"HTTP/1.1", rng.choice([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/3", b"", b"HTTP/1.1 x"])
    )


MAKERS: list[Callable[[random.Random], bytes]] = [
    valid,
    garbage,
    truncated,
    flipped,
    bad_json,
    bad_utf8,
    huge_head,
    chunks,
    smuggled,
    pipelined,
    odd_request,
]


def raw_case(port: int, rng: random.Random) -> tuple[str, list[int], float]:
    """Send a request; returns the name of its kind, the statuses of the responses, and the seconds it took."""
    make = rng.choice(MAKERS)
    data, start = make(rng), time.monotonic()
    patient = make in (valid, bad_json, bad_utf8)  # a whole request: an answer must come
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        answer = b""
        try:
            for part in _parts(rng, data):
                connection.sendall(part)
            leaves = rng.random()
            if leaves < 0.1:  # at once, with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return f"{make.__name__}, reset", [], time.monotonic() - start
            if leaves < 0.2 and not patient:
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(ANSWER_S if patient else WAIT_S)
            while part := connection.recv(65536):
                answer += part
        except TimeoutError:
            if patient:
                raise
        except OSError:  # closed, with something that it did not read
            patient = False
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", answer, re.MULTILINE)]
    if patient and not statuses:
        raise AssertionError(f"no answer to {data[:300]!r}")
    return make.__name__, statuses, time.monotonic() - start


def _parts(rng: random.Random, data: bytes) -> list[bytes]:
    if rng.random() < 0.7 or len(data) < 2:
        return [data]
    cut = rng.randrange(1, len(data))
    return [data[:cut], data[cut:]]
