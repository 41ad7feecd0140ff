"""Tells whoever started the worker that it is ready: one POST, repeated with growing pauses until it is heard."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from http.client import HTTPException
from typing import Any

from refengine.worker.telemetry.log import Log

PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TIMEOUT_S = 5.0


def announce(url: str, facts: dict[str, Any], log: Log) -> None:
    """In a thread that no shutdown waits for. A worker that nobody hears serves all the same."""
    threading.Thread(
        target=_announce, args=(url, json.dumps(facts).encode(), log), name="callback", daemon=True
    ).start()


def _announce(url: str, body: bytes, log: Log) -> None:
    for attempt, pause in enumerate((*PAUSES_S, None), start=1):
        try:
            _post(url, body)
            return
        except (OSError, ValueError, HTTPException) as e:  # urllib's errors and timeouts are OSErrors
            message = f"ready callback failed: {type(e).__name__}, attempt {attempt} of {len(PAUSES_S) + 1}"
            log("error", "WARNING", code="INTERNAL", message=message, status=getattr(e, "code", None))
        if pause is not None:
            time.sleep(pause)


class _Direct(urllib.request.HTTPRedirectHandler):
    """Where a redirect leads, a POST would come as a GET without its body: it is an error, as all but 2xx."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    """Done when a status of 2xx has come. Raises OSError, ValueError or HTTPException."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    urllib.request.build_opener(_Direct).open(request, timeout=TIMEOUT_S).close()
