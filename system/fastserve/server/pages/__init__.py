"""The pages for people: the live page and the interface. A page is sent as one document, which loads nothing else."""

from __future__ import annotations

import re
from importlib.resources import files

from starlette.responses import HTMLResponse

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
}
_STYLESHEET = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)">')


def document(name: str) -> str:
    """Return `name`.html with its stylesheets and its script written into it."""
    text = _STYLESHEET.sub(lambda link: f"<style>\n{_read(link[1])}</style>", _read(f"{name}.html"))
    return _SCRIPT.sub(lambda tag: f"<script>\n{_read(tag[1])}", text)


def page_response(text: str) -> HTMLResponse:
    """Return the response with a page's document, which may contact this server only."""
    return HTMLResponse(text, headers=_HEADERS)


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
