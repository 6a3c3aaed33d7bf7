"""Spans on a terminal: any text stays on one line, and the peak is marked and in sight."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_census.cli.show import correlation, highlighted, marked, printable

TEXTS = st.text(max_size=30)


@given(TEXTS)
def test_any_text_is_printed_without_control_characters_and_once_for_all(text: str) -> None:
    line = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in line)
    assert printable(line) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n\tb", "a↩⇥b"), ("a   b", "a b"), ("\x1b[31mred", "\ufffd[31mred"), ("café 日本", "café 日本")],
)
def test_line_ends_and_tabs_are_shown_and_spaces_are_one(text: str, line: str) -> None:
    assert printable(text) == line


@given(st.lists(TEXTS, min_size=1, max_size=8), st.data(), st.integers(6, 60))
def test_the_peak_is_marked_between_what_fits_before_and_after_it(tokens: list[str], data, width: int) -> None:
    peak = data.draw(st.integers(0, len(tokens) - 1))
    before, after = (printable("".join(part)) for part in (tokens[:peak], tokens[peak + 1 :]))
    for _ in range(max(len(before) - math.ceil(width * 2 / 3), 0)):
        before = before[1:]
    shown = marked(tokens, peak, width)
    assert shown.plain == f"{before}«{printable(tokens[peak]) or chr(0xFFFD)}»{after[: width // 3]}"
    assert highlighted({"tokens": tokens, "position": 7 + peak, "start": 7}, width) == shown


def test_an_undefined_correlation_says_so() -> None:
    assert correlation(None) == "undefined (one side is constant)"
    assert correlation(0.25) == "0.250"
