"""A hub of models on this machine: what huggingface_hub asks of one when it lists and fetches a repo's files.

As on the real one, a file's address redirects to another host, and says that there is a chunked way (Xet) too.
"""

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenOfTheTests"
BLOCK = 1 << 16


@functools.cache
def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """gated: files, though not their list, want the token. private: there is no such repo without it."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    tags: tuple[str, ...] = ()

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted((n, sha256_of(d)) for n, d in self.files.items())).encode()).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """status: of every answer from now on. cut: a file's connection ends after so many bytes; hang: it falls silent."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    status: int | None = None
    cut: int | None = None
    hang: bool = False
    pause: float = 0.0
    garbled: bool = False
    ignore_range: bool = False
    plain: bool = False

    def paths(self, method: str, part: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and part in r.path]


@contextmanager
def hub_serving(**repos: Repo) -> Iterator[Hub]:
    """A hub with these repos of the owner `me`."""
    hub = Hub({f"me/{name}": repo for name, repo in repos.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads, server.block_on_close = True, False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hang = False
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        hub.requests.append(Request(self.command, self.path, dict(self.headers.items())))
        if hub.status is not None:
            self._json({"error": "no"}, hub.status)
            return
        if hub.plain:
            self._send(200, b"<html>Welcome to this network</html>", {"Content-Type": "text/html"})
            return
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._content(match[1])
        else:
            self._json({"error": "no such route"}, 404)

    def _repo(self, name: str, revision: str, of_file: bool = False) -> Repo | None:
        repo = self.hub.repos.get(name)
        authorization = self.headers.get("Authorization")
        known = authorization == f"Bearer {TOKEN}"
        if authorization is not None and not known:
            self._json({"error": "bad token"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not known):
            self._json({"error": "Repository not found"}, 404 if known else 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", repo.commit, *repo.tags):
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif of_file and repo.gated and not known:
            self._json({"error": "Access is restricted"}, 401, {"X-Error-Code": "GatedRepo"})
        else:
            return repo
        return None

    def _model(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        siblings = []
        for file, data in repo.files.items():
            lfs = {"sha256": sha256_of(data), "size": len(data), "pointerSize": 134}
            siblings.append({"rfilename": file, "size": len(data), "blobId": "0" * 40, "lfs": lfs})
        told = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "private": repo.private,
            "siblings": siblings,
        }
        self._json({**told, "gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision, of_file=True)
        if repo is None:
            return
        if file not in repo.files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = repo.files[file]
        sha256 = sha256_of(data)
        port = urlsplit(self.hub.url).port
        self._send(
            302,
            b"",
            {
                "Location": f"http://localhost:{port}/cdn/{sha256}?Signature=aSecretOfTheHub",
                "X-Repo-Commit": repo.commit,
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{sha256}"',
                "ETag": f'"{sha256}"',
                "X-Xet-Hash": "ab" * 32,
                "Link": f'<{self.hub.url}/api/models/{name}/xet-read-token/{repo.commit}>; rel="xet-auth"',
            },
        )

    def _content(self, sha256: str) -> None:
        hub = self.hub
        contents = (data for repo in hub.repos.values() for data in repo.files.values())
        data = next(data for data in contents if sha256_of(data) == sha256)
        if hub.garbled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        first, asked = 0, self.headers.get("Range")
        headers = {"Accept-Ranges": "bytes"}
        if asked and not hub.ignore_range:
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in {**headers, "Content-Length": str(len(data) - first)}.items():
            self.send_header(name, value)
        self.end_headers()
        end = len(data) if hub.cut is None else min(len(data), first + hub.cut)
        try:
            for start in range(first, end, BLOCK):
                self.wfile.write(data[start : min(end, start + BLOCK)])
                time.sleep(hub.pause)
            while hub.hang and end < len(data):
                time.sleep(0.02)
        except OSError:  # the client has gone
            pass
        self.close_connection = True

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
