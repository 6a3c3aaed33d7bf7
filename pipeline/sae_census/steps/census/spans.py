"""Spans: kept samples with their window of text and the feature's code at every token of it.

Addresses come from the reduce, texts from the shard files, codes from the partials; no model runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.store import layout

_NEAR = (8, 4)
"""Two spans of a group are near duplicates if these many tokens before the peak, and from it on, are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAddresses:
    """Where spans are, sorted by feature, group and rank."""

    feature: Int64[np.ndarray, " N"]
    group: Int64[np.ndarray, " N"]
    """Index into the catalog's group names."""
    rank: Int64[np.ndarray, " N"]
    """From 0, best first."""
    shard: Int32[np.ndarray, " N"]
    row: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    value: Float32[np.ndarray, " N"]

    def where(self, keep: Bool[np.ndarray, " N"] | Int64[np.ndarray, " M"]) -> "SpanAddresses":
        """The addresses at `keep`."""
        return SpanAddresses(**{name: getattr(self, name)[keep] for name in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """Rows of unequal length: row i is values[start[i]:start[i + 1]]."""

    start: Int64[np.ndarray, " Q"]
    """One more than there are rows."""
    values: np.ndarray


def take_ranges(begin: Int64[np.ndarray, " N"], end: Int64[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Indices begin[i], …, end[i] - 1 of all i in one array, and where each i starts in it (N + 1)."""
    length = end - begin
    start = np.concatenate([[0], np.cumsum(length)])
    return np.arange(start[-1]) + np.repeat(begin - start[:-1], length), start


class ShardText:
    """The tokens and documents of one shard, flat."""

    def __init__(self, blobs: LocalBlobs, preparation_id: str, shard_id: str):
        data = tables.read(blobs.path(layout.shard(preparation_id, shard_id)))
        self.slice: str = data["slice"][0].as_py()
        self.token_start, self.token_ids = tables.ragged(data, "input_ids")
        _, self.document_ids = tables.ragged(data, "document_id")
        run_start, run_first = tables.ragged(data, "document_start")
        run_of_context = np.repeat(np.arange(data.num_rows), np.diff(run_start))
        self.run_start = self.token_start[run_of_context] + run_first

    def window(
        self, row: Int32[np.ndarray, " N"], position: Int32[np.ndarray, " N"], before: int, after: int
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"], np.ndarray]:
        """Start and stop (flat, half-open) of the tokens around each address inside its document, and its id."""
        flat = self.token_start[row] + position
        run = np.searchsorted(self.run_start, flat, side="right") - 1
        run_stop = np.minimum(np.append(self.run_start[1:], len(self.token_ids))[run], self.token_start[row + 1])
        start = np.maximum(flat - before, self.run_start[run])
        stop = np.minimum(flat + after + 1, run_stop)
        return start, stop, self.document_ids[run]


def attach(
    addresses: SpanAddresses,
    codes: Ragged,
    code_positions: Int32[np.ndarray, " M"],
    *,
    blobs: LocalBlobs,
    preparation_id: str,
    shard_ids: Sequence[str],
    tokenizer: Tokenizer,
    before: int,
    after: int,
    group_names: Sequence[str],
    hook_point: str,
    sae: str,
) -> tuple[tables.Table, Int64[np.ndarray, " N"]]:
    """The rows of `spans.parquet` for some addresses, near duplicates left out.

    Args:
        addresses: sorted by feature, group, rank.
        codes: for each address, the feature's codes in its context.
        code_positions: the position of each of those codes.
        blobs: the store.
        preparation_id: names the shards' folder.
        shard_ids: by ordinal.
        tokenizer: makes text.
        before: tokens of a window before the peak.
        after: tokens after it.
        group_names: of the group indices.
        hook_point: of the SAE.
        sae: its name.

    Returns:
        The table, and the indices of the addresses that were left out because an earlier one of the same
        feature and group has the same tokens around its peak.
    """
    num = len(addresses.row)
    starts, stops = np.zeros(num, np.int64), np.zeros(num, np.int64)
    slices, documents = np.empty(num, object), np.empty(num, object)
    ids: list[Int32[np.ndarray, " W"]] = [np.zeros(0, np.int32)] * num
    near = np.full((num, sum(_NEAR)), -1, np.int32)
    for ordinal in np.unique(addresses.shard):
        mine = np.flatnonzero(addresses.shard == ordinal)
        text = ShardText(blobs, preparation_id, shard_ids[ordinal])
        row, position = addresses.row[mine], addresses.position[mine]
        start, stop, document = text.window(row, position, before, after)
        first = text.token_start[row]
        starts[mine], stops[mine] = start - first, stop - first
        slices[mine], documents[mine] = text.slice, document
        for place, begin, end in zip(mine, start, stop, strict=True):
            ids[place] = text.token_ids[begin:end]
        around = (first + position)[:, None] + np.arange(-_NEAR[0], _NEAR[1])
        inside = (around >= start[:, None]) & (around < stop[:, None])
        near[mine] = np.where(inside, text.token_ids[np.clip(around, 0, len(text.token_ids) - 1)], -1)
    kept, dropped = _first_of_equals(np.column_stack([addresses.feature, addresses.group, near]))
    lengths = stops - starts
    values = _window_values(addresses, codes, code_positions, starts, stops)
    picked = [ids[i] for i in kept]
    flat_ids = np.concatenate([np.zeros(0, np.int32), *picked])
    offsets = np.concatenate([[0], np.cumsum(lengths[kept])])
    words = tokenizer.token_texts([p.tolist() for p in picked])
    of_word = {text: i for i, text in enumerate(dict.fromkeys(text for row in words for text in row))}
    word = np.array([of_word[text] for row in words for text in row], np.int64)
    flat_places, _ = take_ranges(values.start[:-1][kept], values.start[1:][kept])
    chosen = addresses.where(kept)
    table = tables.table(
        schemas.SPANS,
        {
            "hook_point": [hook_point] * len(kept),
            "sae": [sae] * len(kept),
            "feature_id": chosen.feature,
            "group": [group_names[g] for g in chosen.group],
            "sample_rank": chosen.rank,
            "shard_id": [shard_ids[s] for s in chosen.shard],
            "context_id": chosen.row,
            "document_id": documents[kept],
            "slice": slices[kept],
            "position": chosen.position,
            "start": starts[kept],
            "stop": stops[kept],
            "value": chosen.value,
            "text": ["".join(row) for row in words],
            "tokens": tables.lists(offsets, word, list(of_word)),
            "token_ids": tables.lists(offsets, flat_ids),
            "values": tables.lists(offsets, values.values[flat_places]),
        },
    )
    return table, dropped


def _first_of_equals(rows: np.ndarray) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " M"]]:
    """Indices of rows that equal no earlier row, ascending; and of the others."""
    _, first = np.unique(rows, axis=0, return_index=True)
    kept = np.sort(first)
    return kept, np.setdiff1d(np.arange(len(rows)), kept)


def _window_values(
    addresses: SpanAddresses,
    codes: Ragged,
    code_positions: Int32[np.ndarray, " M"],
    starts: Int64[np.ndarray, " N"],
    stops: Int64[np.ndarray, " N"],
) -> Ragged:
    """The feature's code at every token of each window; 0 where it is silent or the token is not counted."""
    start = np.concatenate([[0], np.cumsum(stops - starts)])
    values = np.zeros(int(start[-1]), np.float32)
    owner = np.repeat(np.arange(len(addresses.row)), np.diff(codes.start))
    inside = (code_positions >= starts[owner]) & (code_positions < stops[owner])
    owner = owner[inside]
    values[start[owner] + code_positions[inside] - starts[owner]] = codes.values[inside]
    return Ragged(start=start, values=values)
