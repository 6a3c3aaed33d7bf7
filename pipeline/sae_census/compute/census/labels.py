"""Proto-labels: one line that says where a feature fires, made of its spans' words without any model.

`except after ↩␣␣␣ · near try, clause` reads: it fires on "except", after a line break with an indent, with "try" and
"clause" near by. Words are counted in ranges of features and compared once for all features of an SAE, so that no
label depends on how the features were cut into ranges.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sae_census.compute.census.words import PLACES, Place, SpanTokens, WordCounts, count_words, over_represented

START = "⟨start⟩"
"""Shown as the word before the first token of a document, or of its part in a context."""
MAX_CHARACTERS = 80
"""Of a label."""

_MAX_WORDS = (4, 2, 3, 3)
"""At the peak, right before it, near it, and of the logits."""
_MAX_WORD = 20
_LEADS = ("after", "near", "says")
_RUN = re.compile(r"([\W_])\1{3,}")
_MARKS = {"\n": "↩", "\t": "⇥"}
_SPACE = "␣"
_EMPTY = "⟨empty⟩"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The words of some features, counted."""

    words: tuple[str, ...]
    """Normal forms, sorted: what `WordCounts.word` is an index into."""
    vocabulary: tuple[str, ...]
    """Texts of tokens: what `WordCounts.form` is an index into."""
    places: Mapping[Place, WordCounts]


@lru_cache(1 << 16)
def normal_form(token: str) -> str:
    """What tokens must share to be one word: the visible form without case."""
    return visible(token.lower())


@lru_cache(1 << 16)
def visible(token: str) -> str:
    """A token for readers: without the space around it; other space, or a token of nothing but space, as ␣ ↩ ⇥.

    A run of one character that is no letter or digit is cut to three. What cannot be printed is escaped, and bytes
    of a split character stay �.
    """
    short = _RUN.sub(r"\1\1\1", token.strip() or token)
    return "".join(map(_visible_character, short)) or _EMPTY


def _visible_character(character: str) -> str:
    if character.isspace():
        return _MARKS.get(character, _SPACE)
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def tally(spans: SpanTokens, vocabulary: Sequence[str], num_features: int) -> Tally:
    """Count the words of a range of features; `spans.token` is an index into `vocabulary`."""
    texts = (*vocabulary, START)
    forms = [normal_form(text) for text in texts]
    words = sorted(set(forms))
    index = {word: i for i, word in enumerate(words)}
    places = count_words(spans, np.array([index[form] for form in forms]), num_features)
    return Tally(words=tuple(words), vocabulary=texts, places=places)


def joined(tallies: Sequence[Tally]) -> Tally:
    """The tally of the features of several ranges, one range after another."""
    words = sorted({word for part in tallies for word in part.words})
    index = {word: i for i, word in enumerate(words)}
    here = [np.array([index[word] for word in part.words]) for part in tallies]
    first_text = np.cumsum([0, *(len(part.vocabulary) for part in tallies)])
    first_feature = np.cumsum([0, *(len(part.places["peak"].total) for part in tallies)])

    def of_all(place: Place) -> WordCounts:
        parts = [part.places[place] for part in tallies]
        pool = np.zeros(len(words), np.int64)
        for part, mine in zip(parts, here, strict=True):
            pool[mine] += part.pool
        return WordCounts(
            pool=pool,
            total=np.concatenate([part.total for part in parts]),
            feature=np.concatenate([part.feature + first for part, first in zip(parts, first_feature)]),
            word=np.concatenate([mine[part.word] for part, mine in zip(parts, here)]),
            count=np.concatenate([part.count for part in parts]),
            form=np.concatenate([part.form + first for part, first in zip(parts, first_text)]),
        )

    vocabulary = tuple(text for part in tallies for text in part.vocabulary)
    return Tally(words=tuple(words), vocabulary=vocabulary, places={place: of_all(place) for place in PLACES})


def proto_labels(whole: Tally, says: Sequence[Sequence[str]] | None = None) -> list[str | None]:
    """The label of every feature; None if it has no spans, or if nothing is to be said of it.

    Args:
        whole: of all features of an SAE.
        says: for every feature, the tokens whose logits it raises most, best first.
    """
    found = {place: _found(whole, place) for place in PLACES}
    labels: list[str | None] = []
    for feature, num_spans in enumerate(whole.places["peak"].total.tolist()):
        peak, after, near = ([token for token, _ in found[place][feature]] for place in PLACES)
        covered = sum(count for _, count in found["peak"][feature][: _MAX_WORDS[0]])
        raised = says[feature] if says else ()
        has_others = 2 * covered < num_spans
        labels.append(proto_label(peak, after, near, raised, has_others=has_others) if num_spans else None)
    return labels


def _found(whole: Tally, place: Place) -> list[list[tuple[str, int]]]:
    """For every feature, the tokens over-represented at a place, best first, and how often they stand there."""
    words = over_represented(whole.places[place])
    found: list[list[tuple[str, int]]] = [[] for _ in whole.places[place].total]
    for feature, form, count in zip(words.feature.tolist(), words.form.tolist(), words.count.tolist(), strict=True):
        found[feature].append((whole.vocabulary[form], count))
    return found


def proto_label(
    peak: Sequence[str],
    after: Sequence[str],
    near: Sequence[str],
    says: Sequence[str] = (),
    *,
    has_others: bool = False,
) -> str | None:
    """One line of at most `MAX_CHARACTERS`, or None if there are no words.

    A word that could be mistaken for something else is quoted. A line that would be too long loses the last words
    of its longest lists, later lists first.

    Args:
        peak: tokens that stand at the peak, best first, as all that follow.
        after: tokens that stand right before it.
        near: tokens that stand near it; what `peak` or `after` says is not said again.
        says: tokens whose logits the feature raises.
        has_others: whether most peaks have none of these words; shown as … behind them.
    """
    peak, after = peak[: _MAX_WORDS[0]], after[: _MAX_WORDS[1]]
    said = {normal_form(token) for token in (*peak, *after)}
    near = [token for token in near if normal_form(token) not in said]
    lists = [_shown(tokens, most) for tokens, most in zip((peak, after, near, says), _MAX_WORDS, strict=True)]
    while len(line := _line(lists, has_others)) > MAX_CHARACTERS:
        max(reversed(lists), key=len).pop()
    return line or None


def _line(lists: Sequence[Sequence[str]], has_others: bool) -> str:
    peak, after, near, says = (", ".join(words) for words in lists)
    where = [peak + ", …" * has_others] * bool(peak) + [f"after {after}"] * bool(after)
    parts = [" ".join(where), f"near {near}" * bool(near), f"says {says}" * bool(says)]
    return " · ".join(part for part in parts if part)


def _shown(tokens: Sequence[str], most: int) -> list[str]:
    """The first few different words, as they are printed."""
    words: dict[str, str] = {}
    for token in tokens:
        words.setdefault(normal_form(token), visible(token))
    return [_quoted(word) for word in list(words.values())[:most]]


def _quoted(word: str) -> str:
    if len(word) > _MAX_WORD:
        word = word[: _MAX_WORD - 1] + "…"
    is_word = any(character.isalnum() or character in "␣↩⇥" for character in word)
    return word if is_word and word not in _LEADS and not any(c in word for c in ",·‘’") else f"‘{word}’"
