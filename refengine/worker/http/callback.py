"""Reports to --callback-url that the worker is ready: one POST, repeated with growing pauses until it succeeds."""

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


def announce(url: str, body: dict[str, Any], log: Log) -> None:
    """Send the callback from a daemon thread. Failures are logged and do not stop the worker."""
    threading.Thread(target=_announce, args=(url, json.dumps(body).encode(), log), name="callback", daemon=True).start()


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
    """Treats a redirect as an error, because urllib would follow it with a GET without the body."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    """Send the POST. Raises OSError, ValueError or HTTPException unless the response's status is 2xx."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    urllib.request.build_opener(_Direct).open(request, timeout=TIMEOUT_S).close()
