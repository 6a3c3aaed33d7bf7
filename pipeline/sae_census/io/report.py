"""The door to jinja2: a plain HTML page of tables and highlighted text, and a page that views data files.

Every string is escaped. The viewer is a page of our own markup, style and script; all that comes from a catalog
reaches it as JSON and is shown as text.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-top: 1px solid #ddd; padding-top: 1rem; }
p, caption { color: #555; } caption { text-align: left; font-weight: 600; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start; }
table { border-collapse: collapse; } td, th { padding: .1rem .6rem; text-align: left; }
td { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .85rem; }
.text { white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: .85rem; margin: .3rem 0 1.2rem; }
.peak { outline: 2px solid #222; }
</style>
<h1>{{ title }}</h1>
<p>{{ note }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.note }}</p>
<div class="tables">
{% for table in section.tables %}
<table>
<caption>{{ table.caption }}</caption>
<tr>{% for name in table.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td style="background: {{ cell.shade | colour }}">{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
</div>
{% for line in section.lines %}
<p>{{ line.caption }}</p>
<div class="text">
{%- for cell in line.tokens -%}
<span class="{{ 'peak' if loop.index0 == line.peak else '' }}" title="{{ cell.hint }}"
 style="background: {{ cell.shade | colour }}">{{ cell.text }}</span>
{%- endfor -%}
</div>
{% endfor %}
{% endfor %}
</html>
"""


_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\x7f"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A text with a background."""

    text: str
    shade: float = 0.0
    """-1 (strong blue) to 1 (strong orange)."""
    hint: str = ""
    """Shown while a pointer rests on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Running text whose tokens are shaded."""

    caption: str
    tokens: tuple[Cell, ...]
    peak: int | None = None
    """The token with a frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with what stands under it."""

    title: str
    note: str = ""
    tables: tuple[Grid, ...] = ()
    lines: tuple[Line, ...] = ()


def page(title: str, note: str, sections: Iterable[Section]) -> bytes:
    """A whole page that needs no other file."""
    return _template().render(title=title, note=note, sections=list(sections)).encode()


def viewer(title: str, facts: Any) -> bytes:
    """The page that shows data files: it needs them and nothing else.

    Its policy lets the page's own script run, by its hash, and scripts from where the page lies; the rest is refused.

    Args:
        title: of the window.
        facts: plain values that the page starts from.
    """
    script, style = _script(), _part("viewer.css")
    template = _environment().from_string(_part("viewer.html"))
    return template.render(
        title=title,
        script=script,
        style=style,
        script_hash=_source_hash(script),
        style_hash=_source_hash(style),
        facts=_script_json(facts),
    ).encode()


def data_file(name: str, value: Any) -> bytes:
    """A script that hands plain values to the viewer; a page opened from disk can load nothing else.

    Args:
        name: by which the viewer asks for it.
        value: anything that JSON can say.
    """
    return f"census({_script_json(name)},{_script_json(value)});\n".encode()


def viewer_digest() -> str:
    """Changes with the viewer."""
    return hashlib.sha256("".join([_part("viewer.html"), _part("viewer.css"), _script()]).encode()).hexdigest()


def _script_json(value: Any) -> str:
    """JSON in ASCII that is the same value inside a script, and cannot end one."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.translate(_ESCAPED)


def _script() -> str:
    """The viewer's script: its parts in one strict scope."""
    parts = "\n".join(map(_part, ("elements.js", "pictures.js", "viewer.js")))
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


@cache
def _part(name: str) -> str:
    return resources.files("sae_census.io").joinpath("templates", name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _template() -> Template:
    return _environment().from_string(_PAGE)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["colour"] = _colour
    return environment


def _colour(shade: float) -> str:
    hue = "255, 140, 0" if shade > 0 else "40, 110, 255"
    return f"rgba({hue}, {min(abs(shade), 1.0) * 0.8:.2f})"
