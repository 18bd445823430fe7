"""The report's HTML: Jinja2 templates in the folder templates/, which escape whatever is put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(template: str, /, **values: Any) -> str:
    """The template templates/`template` with these values in it; a text among them is escaped unless it is `Markup`."""
    return _TEMPLATES.get_template(template).render(values)


def part(macro: str, /, **values: Any) -> Markup:
    """The same with one macro of templates/parts.html.j2."""
    return getattr(_TEMPLATES.get_template("parts.html.j2").module, macro)(**values)
