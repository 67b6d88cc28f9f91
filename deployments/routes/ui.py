"""The trajectory viewer: a page of a few hand-written files, which asks the API for everything that it shows.

Invariant: what is served here is the same for everybody and holds no data, so it needs no key; a browser that shows
it loads and runs nothing from anywhere else, and nothing that a model, a tool or a user writes can become script
(Content-Security-Policy, and trusted types, which refuse text as markup).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from rollout.errors import NotFoundError

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).resolve().parent.parent / "ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Kept, and asked about each time: after an upgrade nobody runs half of the old page. The answer is 304 mostly.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    kind: str
    tag: str


@router.api_route("/ui", methods=["GET", "HEAD"])
async def without_slash(request: Request) -> Response:
    """The page's own links are relative to /ui/. So is this, behind a proxy that adds a prefix too."""
    query = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(f"ui/{query}", status_code=307)


@router.api_route("/ui/{name:path}", methods=["GET", "HEAD"])
async def file(request: Request, name: str) -> Response:
    """One of the page's files; 404 for everything else."""
    found = _files().get(name or "index.html")
    if found is None:
        raise NotFoundError("the viewer has no such file; it is at /ui/", "path")
    headers = {**_HEADERS, "etag": found.tag}
    known = request.headers.get("if-none-match", "")
    if found.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.kind, headers=headers)


@functools.cache
def _files() -> dict[str, _File]:
    """All files by name, read once. Names are looked up here and nowhere else, so no path leads out of the folder."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.name] = _File(content, _TYPES[path.suffix], tag)
    return found
