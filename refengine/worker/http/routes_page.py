"""The web pages: `GET /` to try the model and watch the worker, `GET /docs` to read the OpenAPI document.

All their content comes from this worker. Their Content-Security-Policy forbids anything else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from swagger_ui_bundle import swagger_ui_path

from refengine.worker.errors import WorkerError
from refengine.worker.http.openapi import as_openapi_30
from refengine.worker.jobs.worker import Worker

DOCS_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
DOCS_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>refengine worker: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<style>body { margin: 0; }</style>
</head>
<body>
<div id="docs"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "/docs/openapi.json", dom_id: "#docs", validatorUrl: null, deepLinking: true});</script>
</body>
</html>
"""


def make_page_router(worker: Worker) -> APIRouter:
    """The router with both pages for one worker. The OpenAPI document does not list them."""
    router = APIRouter(include_in_schema=False)
    has_template = worker.tokenizer.chat_template is not None
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace('data-chat="yes"', f'data-chat="{"yes" if has_template else "no"}"')
    headers, docs_headers = headers_of(page), headers_of(DOCS_PAGE, "'self'")

    @router.get("/")
    async def try_it() -> Response:
        return HTMLResponse(page, headers=headers)

    @router.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(DOCS_PAGE, headers=docs_headers)

    @router.get("/docs/openapi.json")
    async def document(request: Request) -> Response:
        """The OpenAPI document in version 3.0.3, which Swagger UI 4 reads."""
        return JSONResponse(as_openapi_30(request.app.openapi()))

    @router.get("/docs/{name}")
    async def docs_file(name: str) -> Response:
        if name not in DOCS_FILES:
            raise WorkerError("INVALID_REQUEST", "no such file", status=404)
        return FileResponse(swagger_ui_path / name, media_type=DOCS_FILES[name], headers=docs_headers)

    return router


def headers_of(page: str, files: str = "") -> dict[str, str]:
    """The security headers of a page, which allow only its inline scripts and styles, and the sources in `files`."""

    def sources(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join([*(f"'sha256-{value}'" for value in hashes), *filter(None, [files])])

    policy = {
        "default-src": "'none'",
        "script-src": sources("script"),
        "style-src": sources("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
