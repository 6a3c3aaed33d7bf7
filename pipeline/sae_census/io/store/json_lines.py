"""JSON lines, written and read: only a line feed ends a line, whatever a text holds.

Unicode knows more ends of lines (U+0085, U+2028, U+2029), JSON lets them stand in a string, and many readers split at
them. So they are written escaped, and nothing here ever splits at one.
"""

import json
from collections.abc import Iterator
from typing import Any

_ESCAPES = {mark: f"\\u{mark:04x}" for mark in (0x85, 0x2028, 0x2029)}
"""The ends of lines that JSON does not escape itself; they stand nowhere but in strings."""


def dumps(record: Any, **options: Any) -> str:
    """A record as JSON that no reader takes for several lines; characters beyond ASCII stay as they are.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON has not.
    """
    return json.dumps(record, ensure_ascii=False, allow_nan=False, **options).translate(_ESCAPES)


def line(record: Any) -> str:
    """A record and the end of its line."""
    return dumps(record) + "\n"


def lines(body: bytes) -> Iterator[bytes]:
    """The lines of a file, without their ends and without a mark of byte order; after the last feed there is none."""
    yield from body.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n") if body else ()
