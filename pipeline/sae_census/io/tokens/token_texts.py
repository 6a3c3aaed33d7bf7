"""The text of every token of a run, so that they join to the text of the run, whatever the tokenizer.

The text of a run is what its tokens add to text that goes before: the decoded `[anchor, *run]` without the decoded
anchor. So a space with which its first token begins stays, though many decoders strip it from a whole text. A
character of several tokens stands at the token that completes it, and the others are empty; bytes that are no
character stay �. Nothing is known of the tokenizer but how it decodes.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

_LONGEST = 256
"""Longer runs are taken in parts, each anchored at the token before it: prefixes cost the square of the length."""
_NEAR = 64
_BROKEN = "\ufffd"

Decode = Callable[[Sequence[Sequence[int]]], list[str]]


class TokenTexts:
    """Texts of tokens, remembered."""

    def __init__(self, decode: Decode, anchor: int | None):
        """`decode` gives the texts of runs; `anchor` is a token that may stand before any, None if there is none."""
        self._decode = decode
        self._anchor = anchor
        self._alone: dict[int, str] = {}
        self._parts: dict[tuple[int, ...], list[str]] = {}

    def alone(self, ids: Iterable[int]) -> list[str]:
        """The text that each token adds by itself; bytes of a split character show as �."""
        wanted = list(ids)
        new = sorted({i for i in wanted if i not in self._alone})
        self._alone |= zip(new, self._added([self._anchor] * len(new), [[i] for i in new]), strict=True)
        return [self._alone[i] for i in wanted]

    def of(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        """The texts of the tokens of each run."""
        self.alone({i for row in rows for i in row})
        cuts = [self._cuts(row) for row in rows]
        parts = [list(row[first:last]) for row, at in zip(rows, cuts, strict=True) for first, last in pairwise(at)]
        anchors = [
            row[first - 1] if first else self._anchor
            for row, at in zip(rows, cuts, strict=True)
            for first, _ in pairwise(at)
        ]
        found = iter(map(self._tokens, anchors, parts, self._added(anchors, parts)))
        return [[text for _ in at[1:] for text in next(found)] for at in cuts]

    def _cuts(self, row: Sequence[int]) -> list[int]:
        """Where parts of a run begin, and its end: before a token that is no part of a character, if one is near."""
        cuts = [0]
        while len(row) - cuts[-1] > _LONGEST:
            last = cuts[-1] + _LONGEST
            near = range(last, last - _NEAR, -1)
            whole = (i for i, text in zip(near, self.alone(row[i] for i in near)) if text and _BROKEN not in text)
            cuts.append(next(whole, last))
        return [*cuts, len(row)] if len(row) else [0]

    def _added(self, anchors: Sequence[int | None], rows: Sequence[Sequence[int]]) -> list[str]:
        """What each run adds to the text of its anchor; its own text where the anchor's does not stand before it."""
        few = list(dict.fromkeys(anchors))
        of_anchor = dict(zip(few, self._decode([[] if one is None else [one] for one in few]), strict=True))
        bases = [of_anchor[anchor] for anchor in anchors]
        wholes = self._decode([row if anchor is None else [anchor, *row] for anchor, row in zip(anchors, rows)])
        fits = [whole.startswith(base) for whole, base in zip(wholes, bases, strict=True)]
        free = iter(self._decode([row for row, fit in zip(rows, fits, strict=True) if not fit]))
        return [
            whole.removeprefix(base) if fit else next(free)
            for whole, base, fit in zip(wholes, bases, fits, strict=True)
        ]

    def _tokens(self, anchor: int | None, ids: Sequence[int], whole: str) -> list[str]:
        """Token texts that join to `whole`: each as it is alone if they do, else from prefixes of the run."""
        alone = [self._alone[i] for i in ids]
        if all(alone) and _BROKEN not in whole and "".join(alone) == whole:
            return alone
        found: list[str] = []
        for is_part, group in groupby(zip(ids, alone, strict=True), lambda pair: not pair[1] or _BROKEN in pair[1]):
            several = list(group)
            found += self._part(tuple(i for i, _ in several)) if is_part else [text for _, text in several]
        return found if "".join(found) == whole else self._by_prefix(anchor, ids, whole)

    def _part(self, ids: tuple[int, ...]) -> list[str]:
        """Of a run whose tokens are parts of characters."""
        if ids not in self._parts:
            whole = self._added([self._anchor], [ids])[0]
            self._parts[ids] = self._by_prefix(self._anchor, ids, whole)
        return self._parts[ids]

    def _by_prefix(self, anchor: int | None, ids: Sequence[int], whole: str) -> list[str]:
        """What each prefix of the run has of its text that the one before has not; the last token has the rest."""
        prefixes = self._added([anchor] * (len(ids) - 1), [ids[:n] for n in range(1, len(ids))])
        found, end = [], 0
        for prefix in prefixes:
            start, end = end, max(end, _common(prefix, whole))
            found.append(whole[start:end])
        return [*found, whole[end:]]


def _common(a: str, b: str) -> int:
    """How many characters two texts begin alike with."""
    return next((i for i, (one, other) in enumerate(zip(a, b)) if one != other), min(len(a), len(b)))
