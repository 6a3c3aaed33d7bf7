"""What a report shows of a catalog, as plain values: nothing is rounded, and order is that of the catalog.

Numbers stand as they are in the tables (float32 in its shortest decimal form); only `sparks` is a picture.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sae_census.compute.numbers.stats import BINS_PER_OCTAVE
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.store import tables
from sae_census.steps.census.logits import LOGITS
from sae_census.types import SiteKey

CHUNK = 32
"""Features of one data file."""
BLOCK = 16 * CHUNK
"""Features whose spans are in memory at a time."""
_SPARK_BINS = BINS_PER_OCTAVE // 2
"""Bins of the histogram that one bar of a sparkline joins."""
_SPARK_HEIGHT = 9
_NOT_SHOWN = ("hook_point", "sae", "layer", "stream")

Plain = dict[str, Any]


def by_layer(catalog: Catalog) -> list[str]:
    """`hook_point/sae` of every SAE, in the order of the report."""
    return sorted(catalog.saes, key=lambda site: (SiteKey.parse(site).hook_point.layer, site))


def overview(catalog: Catalog, num_with_spans: int | None) -> Plain:
    """What the page says of the catalog as a whole."""
    manifest = catalog.manifest
    measure, config, coverage = catalog.measure, manifest.config, manifest.coverage
    return {
        "name": manifest.catalog,
        "snapshot": catalog.number,
        "digest": catalog.digest,
        "model": config["model"]["id"],
        "revision": config["model"]["revision"],
        "model_digest": measure.model.digest,
        "dtype": measure.model.dtype,
        "context_length": measure.context_length,
        "packing": config["corpus"]["packing"],
        "masks": measure.content()["masks"],
        "score": manifest.ranking.score,
        "groups": list(manifest.span_groups),
        "slices": [[name, facts.tokens, facts.contexts] for name, facts in coverage.slices.items()],
        "weights": sorted(manifest.weights.items()),
        "shards": coverage.shards,
        "shards_missing": len(coverage.missing),
        "records_dropped": sorted(coverage.records_dropped.items()),
        "tokens_truncated": coverage.tokens_truncated,
        "documents_with_bos": coverage.documents_with_bos,
        "chunk": CHUNK,
        "features_with_spans": num_with_spans,
        "sites": [SiteData(catalog, site).facts() for site in by_layer(catalog)],
    }


class SiteData:
    """One SAE of a catalog: its facts, the columns of its table, and its features in chunks."""

    def __init__(self, catalog: Catalog, site: str):
        """Read numbers, no spans.

        Args:
            catalog: an open one.
            site: `hook_point/sae`.
        """
        self.site = site
        key = SiteKey.parse(site)
        self.hook_point, self.sae = str(key.hook_point), key.sae
        self._catalog = catalog
        self._arrays = catalog.statistics(self.hook_point, self.sae)
        self._table = catalog.of_sae(self.hook_point, self.sae)
        self.num_features = self._table.num_rows
        used = np.flatnonzero(self._arrays["histogram"].any(0))
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        self._first_bin = first // BINS_PER_OCTAVE * BINS_PER_OCTAVE
        self._stop_bin = (last // BINS_PER_OCTAVE + 1) * BINS_PER_OCTAVE
        slices = catalog.table("slices.parquet", filters=self._key())
        self._slices = sorted(set(slices["slice"].to_pylist()))
        self._by_slice = {
            name: np.asarray(slices[name]).reshape(self.num_features, len(self._slices))
            for name in ("count", "tokens_counted", "frequency", "mean_when_firing", "max")
        }

    def _key(self, start: int | None = None, stop: int | None = None) -> list[tuple[str, str, Any]]:
        key: list[tuple[str, str, Any]] = [("hook_point", "=", self.hook_point), ("sae", "=", self.sae)]
        return key if start is None else [*key, ("feature_id", ">=", start), ("feature_id", "<", stop)]

    def facts(self) -> Plain:
        """What the page says of the SAE as a whole."""
        manifest, l0 = self._catalog.manifest, self._arrays["l0_histogram"]
        return {
            "site": self.site,
            "digest": self._catalog.measure.saes[self.site],
            "num_features": self.num_features,
            "dead": int(np.count_nonzero(np.asarray(self._table["dead"]))),
            "tokens": list(manifest.coverage.tokens[self.hook_point].items()),
            "fvu": manifest.fraction_of_variance_unexplained[self.site],
            "l0": float(l0 @ np.arange(len(l0)) / max(int(l0.sum()), 1)),
            "l0_is_bound": bool(l0[-1]),
            "slices": self._slices,
            "slice_tokens": self._by_slice["tokens_counted"][0].tolist(),
            "edges": self._arrays["histogram_edges"].tolist(),
            "spark_start": self._first_bin,
            "spark_bins": _SPARK_BINS,
            "has_logits": manifest.logits is not None,
        }

    def table(self) -> Plain:
        """The columns of the table of features, by id, and the words that its search finds."""
        named = ("rank", "count", "max", "mean_when_firing", "p50", "proto_label", "label")
        words, peaks = _indexed(self._peaks())
        return {
            **{name: self._table[name].to_pylist() for name in named},
            "slice_count": self._by_slice["count"].T.tolist(),
            "sparks": self._sparks(),
            "words": words,
            "peaks": peaks,
        }

    def _sparks(self) -> list[str]:
        """The histogram of every feature in half octaves, each bar a digit: its height as a share of the tallest."""
        bins = self._arrays["histogram"][:, self._first_bin : self._stop_bin]
        bars = bins.reshape(self.num_features, -1, _SPARK_BINS).sum(2)
        heights = np.ceil(bars / np.maximum(bars.max(1, keepdims=True), 1) * _SPARK_HEIGHT).astype(int)
        return ["".join(map(str, row)) for row in heights.tolist()]

    def _peaks(self) -> list[list[str]]:
        """By feature, the peak tokens of its strongest spans, case folded, each once."""
        columns = ["feature_id", "position", "start", "tokens"]
        found: list[dict[str, None]] = [{} for _ in range(self.num_features)]
        for start in range(0, self.num_features, BLOCK):
            key = [*self._key(start, start + BLOCK), ("group", "=", "top")]
            rows = self._catalog.table("spans.parquet", columns, filters=key)
            begin, tokens = tables.ragged(rows, "tokens")
            place = begin[:-1] + np.asarray(rows["position"]) - np.asarray(rows["start"])
            for feature_id, token in zip(rows["feature_id"].to_pylist(), tokens[place], strict=True):
                found[feature_id][token.casefold()] = None
        return [list(peaks) for peaks in found]

    def chunks(self, num_with_spans: int | None) -> Iterator[tuple[int, Plain]]:
        """Number and content of every chunk of features; the best `num_with_spans` have spans (None: all)."""
        rank = np.asarray(self._table["rank"])
        shown = np.ones(self.num_features, bool) if num_with_spans is None else rank <= num_with_spans
        for start in range(0, self.num_features, BLOCK):
            stop = min(start + BLOCK, self.num_features)
            wanted = np.flatnonzero(shown[start:stop]) + start
            spans = self._rows("spans.parquet", start, stop) if len(wanted) else None
            logits = self._rows(LOGITS, start, stop) if self._catalog.manifest.logits is not None else None
            for first in range(start, stop, CHUNK):
                last = min(first + CHUNK, stop)
                mine = None if spans is None else _of_features(spans, shown, first, last)
                yield first // CHUNK, self._chunk(first, last, mine, logits)

    def _rows(self, file: str, start: int, stop: int) -> tables.Table:
        return self._catalog.table(file, filters=self._key(start, stop))

    def _chunk(self, start: int, stop: int, spans: tables.Table | None, logits: tables.Table | None) -> Plain:
        features = [self._feature(row) for row in self._table.slice(start, stop - start).to_pylist()]
        found: Plain = {"features": features, "tokens": [], "documents": [], "shards": []}
        if logits is not None:
            for row in _of_features(logits, None, start, stop).to_pylist():
                shown = [row["token_id"], row["token"], _short(row["logit"])]
                features[row["feature_id"] - start].setdefault(row["sign"], []).append(shown)
        if spans is not None:
            found |= self._spans(spans, features, start)
        return found

    def _feature(self, row: Plain) -> Plain:
        """Everything but spans and logits: the row, its slices, the used part of its histogram."""
        feature_id = row["feature_id"]
        counts = self._arrays["histogram"][feature_id]
        used = np.flatnonzero(counts)
        first, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return {
            **{name: value for name, value in row.items() if name not in _NOT_SHOWN},
            "slices": {name: by_slice[feature_id].tolist() for name, by_slice in self._by_slice.items()},
            "histogram": [first, *counts[first:stop].tolist()],
            "collapsed": self._arrays["spans_collapsed"][feature_id].tolist(),
        }

    def _spans(self, spans: tables.Table, features: list[Plain], start: int) -> Plain:
        """Add firings and the groups that show them to features; the tokens, documents, shards they point into."""
        groups = self._catalog.manifest.span_groups
        kept = np.zeros(spans.num_rows, bool)
        seen: dict[tuple[Any, ...], int] = {}
        for feature in features:
            feature |= {"firings": [], "groups": [[] for _ in groups]}
        num_firings = [0] * len(features)
        columns = ("feature_id", "shard_id", "context_id", "position", "group")
        for row, (*firing, group) in enumerate(zip(*(spans[name].to_pylist() for name in columns), strict=True)):
            feature = firing[0] - start
            known = seen.setdefault(tuple(firing), num_firings[feature])
            if known == num_firings[feature]:  # a firing may stand in several groups
                kept[row] = True
                num_firings[feature] += 1
            features[feature]["groups"][groups.index(group)].append(known)
        rows = spans.filter(kept)
        tokens, token_of = _tokens(rows)
        documents, document_of = _interned(rows["document_id"].to_pylist())
        shards, shard_of = _interned(rows["shard_id"].to_pylist())
        begin, values = tables.ragged(rows, "values")
        facts = rows.select(["feature_id", "slice", "context_id", "position", "start", "value"]).to_pylist()
        for row, fact in enumerate(facts):
            codes = values[begin[row] : begin[row + 1]]
            fires = np.flatnonzero(codes)
            features[fact["feature_id"] - start]["firings"].append(
                [
                    self._slices.index(fact["slice"]),
                    document_of[row],
                    shard_of[row],
                    fact["context_id"],
                    fact["position"],
                    fact["start"],
                    _short(fact["value"]),
                    token_of[begin[row] : begin[row + 1]].tolist(),
                    fires.tolist(),
                    [_short(code) for code in codes[fires]],
                ]
            )
        return {"tokens": tokens, "documents": documents, "shards": shards}


def _tokens(rows: tables.Table) -> tuple[list[list[Any]], np.ndarray]:
    """Id and text of the different tokens, the most frequent first, and the place of every token among them.

    An id has several texts where it is a part of several characters.
    """
    _, ids = tables.ragged(rows, "token_ids")
    _, texts = tables.ragged(rows, "tokens")
    different, places = _interned(zip(ids.tolist(), texts, strict=True))
    return [list(pair) for pair in different], np.array(places, np.int64)


def _of_features(rows: tables.Table, shown: np.ndarray | None, start: int, stop: int) -> tables.Table:
    """The rows of a range of features, of those that are `shown`; rows are sorted by feature."""
    ids = np.asarray(rows["feature_id"])
    first, last = np.searchsorted(ids, [start, stop])
    part = rows.slice(first, last - first)
    return part if shown is None else part.filter(shown[ids[first:last]])


def _interned(values: Iterable[Hashable]) -> tuple[list[Any], list[int]]:
    """The different values, the most frequent first, and the place of each value among them."""
    every = list(values)
    counted = Counter(every)
    order = sorted(counted, key=lambda value: (-counted[value], value))
    place: Mapping[Any, int] = {value: i for i, value in enumerate(order)}
    return order, [place[value] for value in every]


def _indexed(lists: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]]]:
    """The different words of all lists, and the lists as indices into them."""
    words, flat = _interned(word for words in lists for word in words)
    places = iter(flat)
    return words, [[next(places) for _ in one] for one in lists]


def _short(value: Any) -> float:
    """A float32 as the shortest decimal that reads back as the same float32."""
    return float(str(np.float32(value)))
