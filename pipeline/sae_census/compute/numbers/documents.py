"""Sums over whole documents, per feature, as a commutative monoid: what a variance clustered by document needs.

A document is many tokens, and its sums must be complete before they are squared. Codes come in blocks of contexts,
and a document may span contexts: it waits, sparse, until all of its contexts have been seen. So the arrays do not
depend on how contexts were grouped, or in which order they came. Inside a shard that is exact; a document that is
cut at the edge of a shard counts as two.
"""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.codes import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentStats:
    """Sums over documents d of F features; k_d is the count of firings, s_d the sum of codes, n_d counted tokens.

    The integers are exact up to 2**63: for shards of 2**22 tokens, that is a corpus of 2**41.
    """

    document_count: Int64[np.ndarray, " F"]
    """Documents in which the feature fires."""
    document_count_square: Int64[np.ndarray, " F"]
    """Sum of k_d²."""
    document_count_tokens: Int64[np.ndarray, " F"]
    """Sum of k_d n_d."""
    document_total_square: fixed.Limbs
    """Sum of s_d², fixed point with `fixed.SQUARE_SCALE`; each s_d is exact, then read out and squared as float64."""
    document_total_tokens: fixed.Limbs
    """Sum of s_d n_d, fixed point with `fixed.SUM_SCALE`."""

    @classmethod
    def zero(cls, num_features: int) -> "DocumentStats":
        """Sums over no documents."""
        integers = {field.name: np.zeros(num_features, np.int64) for field in fields(cls)[:3]}
        return cls(
            **integers,
            document_total_square=fixed.zeros(num_features),
            document_total_tokens=fixed.zeros(num_features),
        )

    def merge(self, other: "DocumentStats") -> "DocumentStats":
        """Sums over the documents of both; they share none.

        Raises:
            ValueError: if the number of features differs.
        """
        if len(self.document_count) != len(other.document_count):
            raise ValueError(
                f"cannot merge documents of {len(self.document_count)} and {len(other.document_count)} features"
            )
        return DocumentStats(
            document_count=self.document_count + other.document_count,
            document_count_square=self.document_count_square + other.document_count_square,
            document_count_tokens=self.document_count_tokens + other.document_count_tokens,
            document_total_square=fixed.add(self.document_total_square, other.document_total_square),
            document_total_tokens=fixed.add(self.document_total_tokens, other.document_total_tokens),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, for storage."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check_books(self, count: Int64[np.ndarray, " F"]) -> None:
        """Prove what must hold beside the features' counts of firings.

        Raises:
            ValueError: naming the first feature for which it does not.
        """
        wrong = {
            "document_count and count disagree on silence": (self.document_count > 0) != (count > 0),
            "document_count > count": self.document_count > count,
            "document_count_square < count": self.document_count_square < count,
            "document_count_tokens < document_count_square": self.document_count_tokens < self.document_count_square,
        }
        for law, broken in wrong.items():
            if broken.any():
                raise ValueError(f"books do not balance: {law} at feature {int(np.argmax(broken))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What codes add to documents: one entry for each feature and document, sorted by feature, then document."""

    feature: Int32[np.ndarray, " N"]
    document: Int32[np.ndarray, " N"]
    count: Int64[np.ndarray, " N"]
    """Firings."""
    total: fixed.Limbs
    """Sum of codes, fixed point with `fixed.SUM_SCALE`."""

    @classmethod
    def of(cls, codes: Codes, document: Int32[np.ndarray, "R T"]) -> "Pieces":
        """The pieces that some codes of a shard make."""
        owner = document[codes.row, codes.position]
        starts = _runs(codes.feature, owner)
        return cls(
            feature=codes.feature[starts],
            document=owner[starts],
            count=np.diff(np.append(starts, len(codes))),
            total=fixed.segment_sums(codes.value.astype(np.float64), starts, fixed.SUM_SCALE),
        )

    def where(self, keep: Bool[np.ndarray, " N"] | Int64[np.ndarray, " M"]) -> "Pieces":
        """The pieces at `keep`, a mask or an index."""
        return Pieces(**{name: getattr(self, name)[keep] for name in self.__dataclass_fields__})

    def joined(self, other: "Pieces") -> "Pieces":
        """The pieces of both; those of one feature and document become one."""
        if not len(other.count):
            return self
        both = Pieces(
            **{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in self.__dataclass_fields__}
        )
        both = both.where(np.lexsort((both.document, both.feature)))
        starts = _runs(both.feature, both.document)
        return Pieces(
            feature=both.feature[starts],
            document=both.document[starts],
            count=np.add.reduceat(both.count, starts),
            total=fixed.segment_totals(both.total, starts),
        )


def _runs(feature: Int32[np.ndarray, " N"], document: Int32[np.ndarray, " N"]) -> Int64[np.ndarray, " U"]:
    """Where each run of one (feature, document) begins."""
    changes = (np.diff(feature, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0)
    return np.flatnonzero(changes)


def document_grid(
    run_row: Int64[np.ndarray, " N"], run_start: Int64[np.ndarray, " N"], is_new: Bool[np.ndarray, " N"], *,
    num_rows: int, num_positions: int,
) -> Int32[np.ndarray, "R T"]:  # fmt: skip
    """The document of every token of a shard, numbered from 0 in the order of the text; padding goes with the last.

    Args:
        run_row: the context of every run of one document's tokens; runs come in the order of the text.
        run_start: the run's first position there; the first run of a context starts at 0.
        is_new: whether the run begins another document than the run before it.
        num_rows: contexts of the shard.
        num_positions: T.
    """
    begins = np.zeros(num_rows * num_positions, np.int32)
    begins[run_row * num_positions + run_start] = is_new
    return np.cumsum(begins, dtype=np.int32).reshape(num_rows, num_positions) - np.int32(1)


class DocumentCensus:
    """Turns codes that come in blocks of contexts into sums over whole documents."""

    def __init__(self, num_features: int, document: Int32[np.ndarray, "R T"]):
        self._stats = DocumentStats.zero(num_features)
        self._document = document
        num_documents = int(document.max(initial=-1)) + 1
        self._tokens = np.zeros(num_documents, np.int64)
        numbers = np.arange(num_documents)
        self._first_row = np.searchsorted(document[:, -1], numbers, side="left")
        self._stop_row = np.searchsorted(document[:, 0], numbers, side="right")
        self._seen = np.zeros(len(document), bool)
        self._num_seen = np.zeros(num_documents, np.int64)
        no_codes = np.zeros(0, np.int32)
        self._waiting = Pieces(feature=no_codes, document=no_codes, count=np.zeros(0, np.int64), total=fixed.zeros(0))

    @property
    def tokens(self) -> Int64[np.ndarray, " M"]:
        """Counted tokens of every document, as far as its contexts have been seen."""
        return self._tokens

    def see(self, counted: Bool[np.ndarray, "B T"], first_row: int) -> None:
        """Say which tokens count in contexts whose codes the next `add` will bring; every context comes once."""
        rows = slice(first_row, min(first_row + len(counted), len(self._document)))
        self._seen[rows] = True
        document = self._document[rows][counted[: rows.stop - first_row]]
        self._tokens += np.bincount(document, minlength=len(self._tokens))

    def add(self, codes: Codes) -> None:
        """Take the codes of counted tokens of all contexts that were seen since the last call."""
        upto = np.concatenate([[0], np.cumsum(self._seen)])
        num_seen = upto[self._stop_row] - upto[self._first_row]
        complete = num_seen == self._stop_row - self._first_row
        at_once = complete & (self._num_seen == 0)
        self._num_seen = num_seen
        pieces = Pieces.of(codes, self._document)
        alone = at_once[pieces.document]
        self._close(pieces.where(alone))
        waiting = self._waiting.joined(pieces.where(~alone))
        ready = complete[waiting.document]
        self._close(waiting.where(ready))
        self._waiting = waiting.where(~ready)

    def finish(self) -> DocumentStats:
        """The sums over all documents.

        Raises:
            ValueError: if contexts of a document were not seen.
        """
        if len(self._waiting.count):
            raise ValueError(f"document {self._waiting.document[0]} lacks contexts that were never added")
        return self._stats

    def _close(self, pieces: Pieces) -> None:
        """Add documents that are complete."""
        if not len(pieces.count):
            return
        starts = np.flatnonzero(np.diff(pieces.feature, prepend=-1))
        feature = pieces.feature[starts]
        num_tokens = self._tokens[pieces.document]
        total = fixed.to_float(pieces.total, fixed.SUM_SCALE)
        stats = self._stats
        stats.document_count[feature] += np.diff(np.append(starts, len(pieces.count)))
        stats.document_count_square[feature] += np.add.reduceat(pieces.count**2, starts)
        stats.document_count_tokens[feature] += np.add.reduceat(pieces.count * num_tokens, starts)
        for limbs, values, scale in (
            (stats.document_total_square, total * total, fixed.SQUARE_SCALE),
            (stats.document_total_tokens, total * num_tokens, fixed.SUM_SCALE),
        ):
            sums = fixed.segment_totals(fixed.of(values, scale), starts)
            limbs[feature] = fixed.add(limbs[feature], sums)
