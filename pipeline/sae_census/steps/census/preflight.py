"""Before hours are spent: do model, SAE, hook point, scale, BOS rule and text belong together?

A few thousand real tokens show how much variance the reconstruction misses, how many codes a token has, and
how large reconstructions are beside activations. One such look catches nearly every wrong pairing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch

from sae_census.compute.census import masks
from sae_census.compute.numbers.sae import SparseAutoencoder, Transform, folded
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints import LoadedSae
from sae_census.records import ShardRecord
from sae_census.steps.census.shard import Analyzer
from sae_census.steps.model.demands import WRITTEN, Complaint, Run, demands
from sae_census.types import HookPoint, SiteKey

POOR_FVU, HOPELESS_FVU = 0.5, 1.0
MANY_NEGATIVE = 0.01
NUM_TOKENS = 4096
NUM_TRIED = 512
"""Tokens that other settings are tried on."""
MUCH_BETTER = 0.8
CENTRED = "model.center_writing_weights=true"
TRANSFORMS: tuple[Transform, ...] = ("constant_norm_rescale", "layer_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitProbe:
    """Look at the first contexts of these shards."""

    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFit:
    """How an SAE would fit under a setting that the run has not."""

    setting: str
    """What to set for it."""
    fvu: float
    own_fvu: float
    """Without that setting, over the same tokens."""

    @property
    def is_better(self) -> bool:
        """Whether by far, and well."""
        return self.fvu < MUCH_BETTER * self.own_fvu and self.fvu < POOR_FVU

    def __str__(self) -> str:
        less = "activations less their mean over d_model" if self.setting == CENTRED else self.setting
        return f"with {less} the FVU of {NUM_TRIED} tokens is {self.fvu:.3f} in place of {self.own_fvu:.3f}"


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
    """Codes below 0, which a gate without ReLU may have; the census passes over them, and so do the numbers here."""
    dead_share: float
    """Features that fired on none of these tokens."""
    norm: float
    """Median length of an activation."""
    norm_ratio: float
    """Median of (length of the reconstruction) / (length of the activation)."""
    tokens: dict[str, int]
    """The books of its hook point: how many count, and how many each rule excluded."""
    others: tuple[OtherFit, ...] = ()
    """How it would fit if activations entered otherwise."""


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
            others=_others(key, sae, torch.cat(xs[key])),
            tokens=dict(tokens[key.hook_point]),
        )
        for key, sae in analyzer.saes.items()
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
    others: tuple[OtherFit, ...],
    tokens: dict[str, int],
) -> Fit:
    if not len(x):
        nan = float("nan")
        return Fit(
            site=site,
            num_tokens=0,
            fvu=nan,
            l0=nan,
            num_negative=0,
            dead_share=1,
            norm=nan,
            norm_ratio=nan,
            tokens=tokens,
        )
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
        others=others,
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


def complaints(fits: Sequence[Fit], saes: Mapping[SiteKey, LoadedSae], run: Run) -> list[Complaint]:
    """What does not belong together, each as one sentence with its numbers.

    Args:
        fits: as measured.
        saes: by site, with what their checkpoints say.
        run: what it gives.
    """
    found = [Complaint(text=f"{fit.site}: {text}", is_error=True) for fit in fits for text in _misfits(fit)]
    for fit in fits:
        said = saes[fit.site].metadata.get("model_from_pretrained_kwargs") or {}
        other = next((one for one in fit.others if one.setting == CENTRED), None)
        if other and run.can_be_centred and "center_writing_weights" not in said and other.is_better:
            text = f"{fit.site}: {other}; if it was trained on centred writing weights, {CENTRED} would match"
            found.append(Complaint(text=text, is_error=False))
    by_point = {fit.site.hook_point: masks.many_sinks(fit.tokens) for fit in fits}
    found += [Complaint(text=f"{point}: {text}", is_error=False) for point, text in by_point.items() if text]
    return found + demands(saes, run)


def _misfits(fit: Fit) -> Iterator[str]:
    """What is wrong about the numbers of one SAE."""
    if fit.num_tokens == 0:
        yield "the masks leave no token to count"
    elif not fit.fvu <= POOR_FVU:
        word = "hopeless" if not fit.fvu <= HOPELESS_FVU else "poor"
        others = sorted((one for one in fit.others if one.setting != CENTRED), key=lambda one: one.fvu)
        better = "; ".join(str(one) for one in others if one.is_better)
        yield (
            f"the fit is {word}: FVU {fit.fvu:.3f} (expected below {POOR_FVU}), L0 {fit.l0:.1f}, "
            f"|reconstruction| / |x| {fit.norm_ratio:.2f}; check model, hook point and activation scale"
            + (f" ({better})" if better else "")
        )
    num_codes = fit.num_negative + fit.l0 * fit.num_tokens
    if fit.num_negative > MANY_NEGATIVE * num_codes:
        yield (
            f"{fit.num_negative} of {num_codes:.0f} codes are negative, as its gate has no ReLU; a feature fires where "
            "its code is above 0, so the census passes over them"
        )


def refuse(found: Sequence[Complaint]) -> None:
    """Raise CheckpointError if anything among these changes numbers."""
    if errors := [one.text for one in found if one.is_error]:
        raise CheckpointError("; ".join(errors) + " (preflight=warn goes on regardless)")


def _others(site: SiteKey, sae: SparseAutoencoder, x: torch.Tensor) -> tuple[OtherFit, ...]:
    """How the SAE would fit a few of these tokens (N, D) if activations entered otherwise than they do."""
    if not len(x):
        return ()
    x = x[:NUM_TRIED].to(sae.w_enc)
    own, found = _fvu(sae, x), {}
    if site.hook_point.stream in WRITTEN:
        found[CENTRED] = _fvu(sae, x - x.mean(dim=1, keepdim=True))
    if sae.transform == "none" and sae.scale == 1:
        factor = float(f"{sae.width**0.5 / float(x.norm(dim=1).mean().clamp(min=1e-30)):.4g}")
        key = "saes[].normalize_activations="
        found |= {key + how: _fvu(replace(sae, transform=how), x) for how in TRANSFORMS}
        scaled = f"{key}expected_average_only_in saes[].norm_scaling_factor={factor:g}"
        found[scaled] = _fvu(folded(sae, factor), x)
    return tuple(OtherFit(setting=setting, fvu=fvu, own_fvu=own) for setting, fvu in found.items())


def _fvu(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    with torch.inference_mode():
        y = sae.reconstruct(x[None], sae.encode(x[None]))[0]
    variance = (x - x.mean(dim=0)).double().square().sum()
    return float((x - y).double().square().sum() / variance) if variance > 0 else float("nan")
