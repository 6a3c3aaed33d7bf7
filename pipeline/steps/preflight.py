"""Before hours are spent: do model, SAE, hook point, scale, BOS rule and text belong together?

A few thousand real tokens show how much variance the reconstruction misses, how many codes a token has, and
how large reconstructions are beside activations. One such look catches nearly every wrong pairing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from pipeline.compute import masks
from pipeline.errors import CheckpointError
from pipeline.io.checkpoints import LoadedSae
from pipeline.records import ShardRecord
from pipeline.steps.shard import Analyzer
from pipeline.types import HookPoint, SiteKey

POOR_FVU, HOPELESS_FVU = 0.5, 1.0
MANY_NEGATIVE = 0.01
NUM_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProbe:
    """Look at the first contexts of these shards."""

    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How one SAE fits the activations it meets, over counted tokens."""

    site: SiteKey
    num_tokens: int
    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 no better than the mean."""
    l0: float
    """Codes a token."""
    num_negative: int
    """Codes below 0, which a TopK without ReLU may have; the census passes over them, and so do the numbers here."""
    dead_share: float
    """Features that fired on none of these tokens."""
    norm: float
    """Median length of an activation."""
    norm_ratio: float
    """Median of (length of the reconstruction) / (length of the activation)."""
    tokens: dict[str, int]
    """The books of its hook point: how many count, and how many each rule excluded."""


def probe(shards: Sequence[ShardRecord]) -> FitProbe:
    """A look at shards of every slice in turn, until they hold enough tokens."""
    by_slice: dict[str, list[ShardRecord]] = {}
    for shard in shards:
        by_slice.setdefault(shard.slice, []).append(shard)
    chosen: list[ShardRecord] = []
    for turn in zip_longest(*by_slice.values()):
        chosen += [shard for shard in turn if shard is not None]
        if sum(shard.num_tokens for shard in chosen) >= NUM_TOKENS:
            break
    return FitProbe(shards=tuple(chosen))


def measure(analyzer: Analyzer, probe: FitProbe) -> list[Fit]:
    """Run the probe on a loaded analyzer."""
    xs: dict[SiteKey, list[torch.Tensor]] = {key: [] for key in analyzer.saes}
    made: dict[SiteKey, list[torch.Tensor]] = {key: [] for key in analyzer.saes}
    fired = {key: np.zeros(sae.num_features, bool) for key, sae in analyzer.saes.items()}
    num_codes, num_negative = dict.fromkeys(analyzer.saes, 0), dict.fromkeys(analyzer.saes, 0)
    tokens: dict[HookPoint, Counter[str]] = {point: Counter() for point in analyzer.points}
    for batch in analyzer.batches(_first_contexts(analyzer, probe)):
        got, books = analyzer.activations(batch)
        for point in analyzer.points:
            tokens[point].update(masks.tally(books[point]))
        for key, sae in analyzer.saes.items():
            x, counted = got[key.hook_point], books[key.hook_point] == masks.COUNTED
            with torch.inference_mode():
                signed = sae.encode(x, signed=True)
                codes = signed.where(signed.value > 0)
                y = sae.reconstruct(x, codes)
            num_negative[key] += int((signed.value < 0)[counted[signed.row, signed.position]].sum())
            codes = codes.where(counted[codes.row, codes.position])
            fired[key][codes.feature] = True
            num_codes[key] += len(codes)
            keep = torch.from_numpy(counted).to(x.device)
            xs[key].append(x[keep].double().cpu())
            made[key].append(y[keep].double().cpu())
    return [
        _fit(
            key,
            torch.cat(xs[key]),
            torch.cat(made[key]),
            num_codes=num_codes[key],
            num_negative=num_negative[key],
            dead_share=float(1 - fired[key].mean()),
            tokens=dict(tokens[key.hook_point]),
        )
        for key in analyzer.saes
    ]


def _first_contexts(analyzer: Analyzer, probe: FitProbe) -> list[list[int]]:
    """Whole contexts, the same share of every shard, about `NUM_TOKENS` tokens in all."""
    found: list[list[int]] = []
    for shard in probe.shards:
        left = NUM_TOKENS // len(probe.shards)
        for ids in analyzer.contexts(shard.shard_id):
            found.append(ids)
            left -= len(ids)
            if left <= 0:
                break
    return found


def _fit(
    site: SiteKey,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    num_codes: int,
    num_negative: int,
    dead_share: float,
    tokens: dict[str, int],
) -> Fit:
    if not len(x):
        nan = float("nan")
        about = {"fvu": nan, "l0": nan, "norm": nan, "norm_ratio": nan}
        return Fit(site=site, num_tokens=0, num_negative=0, dead_share=1, tokens=tokens, **about)
    norm = x.norm(dim=1)
    variance = (x - x.mean(dim=0)).square().sum()
    return Fit(
        site=site,
        num_tokens=len(x),
        fvu=float((x - y).square().sum() / variance) if variance > 0 else float("nan"),
        l0=num_codes / len(x),
        num_negative=num_negative,
        dead_share=dead_share,
        norm=float(norm.median()),
        norm_ratio=float((y.norm(dim=1) / norm.clamp(min=1e-30)).median()),
        tokens=tokens,
    )


def describe(fit: Fit) -> str:
    """One line for people."""
    negative = f", {fit.num_negative} negative codes passed over" if fit.num_negative else ""
    sinks = f", {fit.tokens['attention_sinks']} attention sinks left out" if fit.tokens["attention_sinks"] else ""
    return (
        f"{fit.site}: FVU {fit.fvu:.3f}, L0 {fit.l0:.1f}{negative}, silent on this sample {fit.dead_share:.1%}, "
        f"|x| {fit.norm:.4g}, |reconstruction| / |x| {fit.norm_ratio:.2f} ({fit.num_tokens} tokens{sinks})"
    )


def complaints(fits: Sequence[Fit], saes: Mapping[SiteKey, LoadedSae], bos: bool) -> list[str]:
    """What does not belong together, each as one sentence with its numbers.

    Args:
        fits: as measured.
        saes: by site, with what their checkpoints say.
        bos: whether contexts begin with BOS.
    """
    found = []
    for fit in fits:
        metadata = saes[fit.site].metadata
        if fit.num_tokens == 0:
            found.append(f"{fit.site}: the masks leave no token to count")
        elif not fit.fvu <= POOR_FVU:
            word = "hopeless" if not fit.fvu <= HOPELESS_FVU else "poor"
            found.append(
                f"{fit.site}: the fit is {word}: FVU {fit.fvu:.3f} (expected below {POOR_FVU}), L0 {fit.l0:.1f}, "
                f"|reconstruction| / |x| {fit.norm_ratio:.2f}; check model, hook point and activation scale"
            )
        num_codes = fit.num_negative + fit.l0 * fit.num_tokens
        if fit.num_negative > MANY_NEGATIVE * num_codes:
            found.append(
                f"{fit.site}: {fit.num_negative} of {num_codes:.0f} codes are negative, as its TopK has no ReLU; a "
                "feature fires where its code is above 0, so the census passes over them"
            )
        if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
            found.append(f"{fit.site}: trained on a model with centred weights, which this one has not")
        trained = metadata.get("prepend_bos")
        if isinstance(trained, bool) and trained != bos:
            rule = "always" if trained else "never"
            found.append(
                f"{fit.site}: trained {'with' if trained else 'without'} BOS, but this corpus has "
                f"{'one' if bos else 'none'}; corpus.bos={rule} would match"
            )
    return found


def doubts(fits: Sequence[Fit]) -> list[str]:
    """What may be as it should and yet looks wrong, each as one sentence; nothing to refuse a run for."""
    by_point = {fit.site.hook_point: masks.many_sinks(fit.tokens) for fit in fits}
    return [f"{point}: {sentence}" for point, sentence in by_point.items() if sentence]


def refuse(found: Sequence[str]) -> None:
    """Raise CheckpointError if there is anything to complain about."""
    if found:
        raise CheckpointError("; ".join(found) + " (preflight=warn goes on regardless)")
