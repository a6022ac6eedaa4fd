"""Rendering: the template of a page is filled with the numbers of a source."""

from __future__ import annotations

import difflib
import traceback
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from fastserve.core.errors import ConfigError
from harness.analysis.files import read_json
from harness.report.pages.functions import functions_on
from harness.report.pages.numbers import percent, short, unsigned
from harness.report.pages.source import Source

ENDING = ".md.jinja"
NOTICE = (
    "<!-- tools/write_pages.py makes this page of workflows/report/pages/{name} and docs/tables; edit the first. -->\n"
)


def templates(folder: Path) -> list[Path]:
    """List the templates of a folder, by name."""
    return sorted(folder.glob(f"*{ENDING}"))


def page_name(template: Path) -> str:
    """The file name of a template's page."""
    return template.name.removesuffix(".jinja")


def render(template: Path, source: Source, project: Path, provenance: str | None = None) -> str:
    """Return the page, in Markdown.

    `project` is the root of the repository, of which workflows/data is taken. `provenance` stands in place of the
    source's own, so that a page made from other tables of the same numbers is the same text.

    Raises ConfigError, with the template and its line, for a name that the source lacks.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "percent": percent, "unsigned": unsigned}
    names: dict[str, Any] = dict(functions_on(source))
    names |= {
        "provenance": source.provenance if provenance is None else provenance,
        "engine_time": read_json(project / "workflows/data/artifact_engine_time.json"),
    }
    try:
        text = environment.get_template(template.name).render(names)
    except (ConfigError, TemplateError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{template}{_line(error, template)}: {error}") from error
    return NOTICE.format(name=template.name) + text


def _line(error: Exception, template: Path) -> str:
    """The line of the template in which an error was raised, as ":12"; empty if unknown."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(template)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return f":{line}" if line else ""


def compared(page: str, committed: Path) -> str:
    """Say whether a page is the committed one: a line, and the lines that differ."""
    before = committed.read_text(encoding="utf-8") if committed.exists() else ""
    if page == before:
        return f"equal to {committed}"
    if not before:
        return f"there is no {committed} to compare with"
    changes = [
        line
        for line in difflib.unified_diff(before.splitlines(), page.splitlines(), "committed", "fresh", lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    count = max(sum(line.startswith(sign) for line in changes) for sign in "+-")
    return "\n".join([f"{count} lines differ from {committed}:", *changes])
