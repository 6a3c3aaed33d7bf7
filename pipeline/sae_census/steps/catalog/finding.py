"""Find features of a catalog by words: in labels, at the peaks of spans, in their text."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sae_census.io.store import tables

Key = tuple[str, str, int]
"""Hook point, SAE, feature id."""
Peaks = dict[Key, list[str]]
"""The peak tokens of every feature's strongest spans, case folded."""


def peaks(table: tables.Table) -> Peaks:
    """The peak token of every span, by feature.

    Args:
        table: rows of `spans.parquet` with the key, `position`, `start` and `tokens`.
    """
    found: Peaks = {}
    begin, tokens = tables.ragged(table, "tokens")
    place = begin[:-1] + np.asarray(table["position"]) - np.asarray(table["start"])
    keys = zip(*(table[name].to_pylist() for name in ("hook_point", "sae", "feature_id")), strict=True)
    for key, token in zip(keys, tokens[place], strict=True):
        found.setdefault(key, []).append(token.casefold())
    return found


def by_label_or_peak(rows: Iterable[Mapping[str, Any]], at_peaks: Peaks, text: str) -> list[dict[str, Any]]:
    """Rows whose label contains a text, or whose spans peak on a token that does, as `Catalog.search` orders them.

    Args:
        rows: with the key, `rank`, `label` and `proto_label`.
        at_peaks: of the strongest spans.
        text: whose case does not count.
    """
    wanted = text.casefold()
    spans: Counter[Key] = Counter({key: sum(wanted in token for token in at) for key, at in at_peaks.items()})
    found = []
    for row in rows:
        label = row["proto_label"] if row["label"] is None else row["label"]
        key = (row["hook_point"], row["sae"], row["feature_id"])
        in_label = wanted in (label or "").casefold()
        if in_label or spans[key]:
            kept = {name: row[name] for name in ("hook_point", "sae", "feature_id", "rank")}
            found.append(kept | {"label": label, "in_label": in_label, "num_spans": spans[key]})
    found.sort(key=lambda row: (not row["in_label"], -row["num_spans"], row["rank"], row["hook_point"], row["sae"]))
    return found


def by_text(spans: Iterable[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Features that fire on a text in these spans, as `Catalog.firing_on` orders them.

    Args:
        spans: with the key, `shard_id`, `context_id`, `start`, `text`, `tokens` and `values`.
        text: as written.
    """
    found: dict[Key, dict[str, Any]] = {}
    seen = set()
    for row in spans:
        key = (row["hook_point"], row["sae"], row["feature_id"])
        strength = _strength_on(text, row["tokens"], row["values"])
        address = (key, row["shard_id"], row["context_id"], row["start"])
        if strength == 0 or address in seen:  # the same window may stand in several groups
            continue
        seen.add(address)
        new = dict(zip(("hook_point", "sae", "feature_id"), key, strict=True))
        entry = found.setdefault(key, new | {"num_spans": 0, "max": 0.0, "text": ""})
        entry["num_spans"] += 1
        if strength > entry["max"]:
            entry["max"], entry["text"] = strength, row["text"]
    order = sorted(found, key=lambda key: (-found[key]["num_spans"], -found[key]["max"], key))
    return [found[key] for key in order]


def _strength_on(text: str, tokens: Sequence[str], values: Sequence[float]) -> float:
    """The strongest value at a token that holds a part of an occurrence of `text`; 0 if there is none."""
    ends = np.cumsum([len(token) for token in tokens])
    starts = np.concatenate([[0], ends[:-1]])
    whole, best, place = "".join(tokens), 0.0, -1
    while (place := whole.find(text, place + 1)) >= 0:
        inside = (starts < place + len(text)) & (ends > place)
        best = max(best, float(np.max(np.asarray(values)[inside], initial=0.0)))
    return best
