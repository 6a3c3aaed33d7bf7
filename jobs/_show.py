"""Pieces of tables for a terminal, safe for any text."""

import re
import unicodedata
from collections.abc import Sequence

from rich.text import Text

PLAIN_WIDTH = 116
"""Of tables where there is no terminal."""
_LINE_ENDS = str.maketrans({"\n": "↩", "\r": "↩", "\t": "⇥"})


def printable(text: str) -> str:
    """The text in one line: line ends show as ↩, runs of spaces are one, control characters show as �."""
    text = re.sub(" {2,}", " ", text.translate(_LINE_ENDS))
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def highlighted(tokens: Sequence[str], peak: int, width: int) -> Text:
    """A window of text with its peak token in bold quotes, cut to about `width` characters around it."""
    before, at, after = (
        printable("".join(part)) for part in (tokens[:peak], tokens[peak : peak + 1], tokens[peak + 1 :])
    )
    return Text.assemble(before[-width * 2 // 3 :], (f"«{at}»", "bold"), after[: width // 3])
