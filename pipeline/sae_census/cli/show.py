"""What tables on a terminal share: spans on one line with their peak marked, safe for any text."""

import re
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_SPAN_WIDTH = 54
_PLAIN_WIDTH = 116
_LINE_ENDS = str.maketrans({"\n": "↩", "\r": "↩", "\t": "⇥"})


def console() -> Console:
    """As wide as the terminal, or of a fixed width where there is none."""
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def printable(text: str) -> str:
    """The text in one line: line ends show as ↩, runs of spaces are one, control characters show as �."""
    text = re.sub(" {2,}", " ", text.translate(_LINE_ENDS))
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def correlation(value: float | None) -> str:
    """A rank correlation in words; one that is undefined says so."""
    return "undefined (one side is constant)" if value is None else f"{value:.3f}"


def highlighted(span: dict[str, Any], width: int = _SPAN_WIDTH) -> Text:
    """About `width` characters of a span of a catalog, two thirds before its peak token, which is marked."""
    return marked(span["tokens"], int(span["position"]) - int(span["start"]), width)


def marked(tokens: list[str], peak: int, width: int = _SPAN_WIDTH) -> Text:
    """The same for the tokens of a window, and the place of its peak among them; a part of a character shows as �."""
    parts = tokens[:peak], [tokens[peak] or "\ufffd"], tokens[peak + 1 :]
    before, at, after = (printable("".join(part)) for part in parts)
    return Text.assemble(before[-width * 2 // 3 :], (f"«{at}»", "bold"), after[: width // 3])
