"""Codes of sequences at hook points, one by one through a cache, or many in padded batches.

The cache knows activations by model and tokens, codes by these and the SAE's digest: another SAE, model, dtype
or token is another key. Batches bypass it: padding changes last bits, and what is cached must not depend on
neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae_census.compute.census import masks
from sae_census.compute.numbers.codes import Codes
from sae_census.errors import ShardError
from sae_census.io.model import generation
from sae_census.io.store.memo import ArrayCache
from sae_census.steps.model.reader import Reader
from sae_census.types import HookPoint, SiteKey

BATCH_TOKENS = 4096
"""Of one forward pass, padding included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the model says about one sequence of T tokens."""

    codes: dict[SiteKey, Codes]
    norms: dict[HookPoint, Float64[np.ndarray, " T"]]
    """Lengths of the activations."""
    peaks: dict[HookPoint, Float64[np.ndarray, " T"]]
    """The largest magnitude of a dimension of each."""
    entropy: Float64[np.ndarray, " T"] | None


class Codebook:
    """Looks codes up or computes them."""

    def __init__(self, reader: Reader, identity: dict[str, Any], cache: ArrayCache | None):
        """Hold a loaded model.

        Args:
            reader: with the model's head, if entropies will be asked for.
            identity: everything but tokens and SAE that decides codes.
            cache: for `read`.
        """
        self._reader, self._identity, self._cache = reader, identity, cache

    def read(self, ids: Sequence[int], sites: Sequence[SiteKey], *, entropy: bool) -> Read:
        """Codes of one sequence, from the cache where it has them.

        Raises:
            ShardError: if an activation is NaN or infinite.
        """
        if self._cache is None:
            return _sound(next(self._batch([list(ids)], sites, entropy=entropy)))
        tokens = {"identity": self._identity, "ids": list(ids)}
        of_site = {s: [tokens, str(s.hook_point), self._reader.loaded[s].digest] for s in sites}
        points = sorted({site.hook_point for site in sites})
        found = {site: self._cache.get([*key, "codes"]) for site, key in of_site.items()}
        known = {point: self._cache.get([tokens, str(point), "sizes"]) for point in points}
        surprise = self._cache.get([tokens, "entropy"]) if entropy else {"entropy": np.zeros(0)}
        if all(x is not None for x in (*found.values(), *known.values(), surprise)):
            return Read(
                codes={site: Codes(**arrays) for site, arrays in found.items() if arrays},
                norms={point: arrays["norm"] for point, arrays in known.items() if arrays},
                peaks={point: arrays["peak"] for point, arrays in known.items() if arrays},
                entropy=surprise["entropy"] if entropy and surprise else None,
            )
        kept = {point: self._cache.get([tokens, str(point), "activations"]) for point in points}
        if surprise is None or any(arrays is None for arrays in kept.values()):
            got, entropies = self._forward([list(ids)], points, entropy=entropy)
            for point, x in got.items():
                self._cache.put([tokens, str(point), "activations"], _as_bytes(x))
        else:
            got, entropies = {point: _as_tensor(arrays) for point, arrays in kept.items() if arrays}, None
            if entropy:
                entropies = torch.from_numpy(surprise["entropy"])[None]
        read = _sound(next(self._encoded([list(ids)], sites, got, entropies)))
        for site, key in of_site.items():
            codes = read.codes[site]
            self._cache.put(
                [*key, "codes"], {name: getattr(codes, name) for name in ("feature", "row", "position", "value")}
            )
        for point, norm in read.norms.items():
            self._cache.put([tokens, str(point), "sizes"], {"norm": norm, "peak": read.peaks[point]})
        if read.entropy is not None:
            self._cache.put([tokens, "entropy"], {"entropy": read.entropy})
        return read

    def read_many(
        self, rows: Sequence[list[int]], sites: Sequence[SiteKey], *, entropy: bool
    ) -> Iterator[tuple[int, Read | ShardError]]:
        """Codes of many sequences with the index of each, batch by batch, the shortest first."""
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        while order:
            size = max(n for n in range(1, len(order) + 1) if n == 1 or n * len(rows[order[n - 1]]) <= BATCH_TOKENS)
            batch, order = order[:size], order[size:]
            yield from zip(batch, self._batch([rows[i] for i in batch], sites, entropy=entropy), strict=True)

    def _batch(self, rows: list[list[int]], sites: Sequence[SiteKey], *, entropy: bool) -> Iterator[Read | ShardError]:
        got, entropies = self._forward(rows, sorted({site.hook_point for site in sites}), entropy=entropy)
        yield from self._encoded(rows, sites, got, entropies)

    def _forward(
        self, rows: list[list[int]], points: Sequence[HookPoint], *, entropy: bool
    ) -> tuple[dict[HookPoint, Tensor], Float[Tensor, "B T"] | None]:
        reader = self._reader
        longest = max(map(len, rows))
        ids = torch.tensor([row + [reader.fill_id] * (longest - len(row)) for row in rows])
        if not entropy:
            return reader.activations(ids, points), None
        with reader.model.captures(points) as captures:
            got, hidden = reader.model.run_whole(captures, ids)
        return got, generation.next_token_entropy(reader.model, hidden)

    def _encoded(
        self,
        rows: list[list[int]],
        sites: Sequence[SiteKey],
        got: dict[HookPoint, Tensor],
        entropies: Float[Tensor, "B T"] | None,
    ) -> Iterator[Read | ShardError]:
        sizes = {point: masks.sizes(x) for point, x in got.items()}
        with torch.inference_mode():
            codes = {site: _by_row(self._reader.saes[site].encode(got[site.hook_point]), rows) for site in sites}
        for row, ids in enumerate(rows):
            numbers = [split[row].value for split in codes.values()]
            if entropies is not None:
                numbers.append(entropies[row, : len(ids)].numpy())
            broken = [str(p) for p, (norm, _) in sizes.items() if not np.isfinite(norm[row, : len(ids)]).all()]
            if broken:
                yield ShardError(f"activations at {', '.join(broken)} are NaN or infinite; try another dtype")
                continue
            if not all(np.isfinite(values).all() for values in numbers):
                yield ShardError("a code or an entropy is NaN or infinite; try another dtype")
                continue
            yield Read(
                codes={site: split[row] for site, split in codes.items()},
                norms={point: norm[row, : len(ids)] for point, (norm, _) in sizes.items()},
                peaks={point: peak[row, : len(ids)] for point, (_, peak) in sizes.items()},
                entropy=None if entropies is None else entropies[row, : len(ids)].double().numpy(),
            )


def _by_row(codes: Codes, rows: list[list[int]]) -> list[Codes]:
    """The codes of each row's real tokens, features ascending, as row 0."""
    order = np.argsort(codes.row, kind="stable")
    ends = np.searchsorted(codes.row[order], np.arange(len(rows) + 1))
    split = []
    for row, ids in enumerate(rows):
        mine = codes.where(order[ends[row] : ends[row + 1]])
        mine = mine.where(mine.position < len(ids))
        split.append(Codes(feature=mine.feature, row=np.zeros_like(mine.row), position=mine.position, value=mine.value))
    return split


def _sound(read: Read | ShardError) -> Read:
    if isinstance(read, ShardError):
        raise read
    return read


def _as_bytes(x: Tensor) -> dict[str, np.ndarray]:
    """A tensor of any dtype; NumPy has no bfloat16."""
    return {"dtype": np.array(str(x.dtype).removeprefix("torch.")), "x": x.cpu().view(torch.uint8).numpy()}


def _as_tensor(arrays: dict[str, np.ndarray]) -> Tensor:
    dtype: torch.dtype = getattr(torch, str(arrays["dtype"]))
    return torch.from_numpy(arrays["x"]).view(dtype)
