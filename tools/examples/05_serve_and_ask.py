"""Start a worker on the CPU, ask it for a haiku over HTTP, and stop it. Needs the extra `serve`."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid

from refengine.client import Client, ConnectionFailed, Token

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-m", "refengine", "serve", "--worker-id", str(uuid.uuid4()), "--device", "cpu"]
worker = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
try:
    with Client(f"http://127.0.0.1:{port}") as client:
        for _ in range(100):  # until it listens
            try:
                client.health()
                break
            except ConnectionFailed:
                time.sleep(0.2)
        for event in client.execute("Write a haiku about the sea", max_tokens=50, seed=42):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)
    print()
finally:
    worker.terminate()
    worker.wait()
