"""From codes to the answer: kept tokens, scores, gates, ranking, and the evidence for what is returned."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from sae_census.compute import discovery
from sae_census.compute.census import masks
from sae_census.compute.discovery import Candidates, Gate, Ranking
from sae_census.config import DiscoverRequest
from sae_census.findings import AgainstCatalog, Analyzed, Discovery, FoundFeature, GatedFeature, Scores, Span, UsedSae
from sae_census.steps.discovery.background import Background, LabelSource
from sae_census.steps.discovery.codebook import Read
from sae_census.steps.discovery.requests import Loaded
from sae_census.steps.discovery.sequences import Sequence as Tokens
from sae_census.types import STREAMS, SiteKey

WINDOW = (16, 8)
"""Tokens of a span before its peak, and from the peak on."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A feature of one SAE, and where its measurements stand."""

    site: SiteKey
    found: Candidates
    i: int
    score: float


class Answer:
    """The answer to one request about one sequence, in the making."""

    def __init__(
        self, loaded: Loaded, request: DiscoverRequest, sites: Sequence[SiteKey], sequence: Tokens, read: Read
    ):
        self._loaded, self._request, self._sites = loaded, request, sites
        self._sequence, self._read = sequence, read
        self._masks = loaded.masks(request)
        self._allowed = allowed_tokens(loaded, request, sequence)
        points = {site.hook_point for site in sites}
        if self._masks.max_norm_ratio is not None:
            for point in points:
                self._allowed &= ~discovery.norm_outliers(read.norms[point], self._masks.max_norm_ratio)
        sinks = np.any([discovery.attention_sinks(read.norms[p], read.peaks[p]) for p in points], axis=0)
        self._num_sinks = 0
        if self._masks.attention_sinks:
            self._num_sinks = int((self._allowed & sinks).sum())
            self._allowed &= ~sinks
        self._kept = self._keep()
        self._kept_sinks = int((self._kept & sinks).sum())
        self._taus = {site: self._tau(site) for site in sites}

    def _keep(self) -> Bool[np.ndarray, " T"]:
        request, deepest = self._request, max(site.hook_point for site in self._sites)
        weight = {"entropy": self._read.entropy, "norm": self._read.norms[deepest], "none": None}[request.token_filter]
        if weight is None:  # all are kept
            return self._allowed
        return discovery.kept_tokens(weight, self._allowed, request.topk_tokens_per_seq)

    def make(self) -> Discovery:
        """Score, rank, gate, cut, and attach evidence."""
        lists = [self._ranking(sites) for sites in self._lists()]
        return Discovery(
            model_id=self._loaded.model_id,
            sae_id=self._request.sae_id or ", ".join(dict.fromkeys(site.sae for site in self._sites)),
            analyzed=self._analyzed([ranking for ranking, _ in lists]),
            features=[
                FoundFeature(rank=rank, **self._told(candidate(i)))
                for ranking, candidate in lists
                for rank, i in enumerate(ranking.ranked, 1)
            ],
            below_gate=[
                GatedFeature(gate=gate, **self._told(candidate(i)))
                for ranking, candidate in lists
                for i, gate in self._below(ranking)
            ],
        )

    def _lists(self) -> list[list[SiteKey]]:
        """The sites of every ranking."""
        return [[*self._sites]] if self._request.merge_across_layers else [[site] for site in self._sites]

    def _ranking(self, sites: Sequence[SiteKey]) -> tuple[Ranking, Callable[[int], _Candidate]]:
        """One ranking over the candidates of some sites, and what stands at a place of it."""
        request = self._request
        found = [self._candidates(site) for site in sites]
        score = np.concatenate(
            [one.score(request.score_mode) / self._scale(site) for site, one in zip(sites, found, strict=True)]
        )
        start = np.concatenate([[0], np.cumsum([len(one.feature) for one in found])])
        fires = np.concatenate([one.fired for one in found]) > 0

        def candidate(i: int) -> _Candidate:
            owner = int(np.searchsorted(start, i, side="right")) - 1
            return _Candidate(sites[owner], found[owner], i - int(start[owner]), float(score[i]) if fires[i] else 0.0)

        ranking = discovery.ranked(
            score,
            np.concatenate([one.coverage for one in found]),
            fires,
            least_coverage=request.min_coverage_pct,
            at_most=request.return_top_x,
        )
        return ranking, candidate

    def _below(self, ranking: Ranking) -> list[tuple[int, Gate]]:
        """What the answer tells of those that are not ranked: of a restricted search all, else what fills it up."""
        pairs = list(zip(ranking.below.tolist(), ranking.gates, strict=True))
        if self._request.restrict_features:
            return pairs
        return pairs[: self._request.return_top_x - len(ranking.ranked)]

    def _candidates(self, site: SiteKey) -> Candidates:
        """What fires on kept tokens; if the search is restricted, all of its list."""
        codes, background = self._read.codes[site], self._background(site)
        num_features = self._loaded.reader.saes[site].num_features
        others = self._allowed & ~self._kept
        elsewhere = discovery.mean_over(codes, others, num_features) if background is None else background.mean
        if not self._request.restrict_features:
            return discovery.measure(codes, self._kept, self._taus[site], elsewhere)
        wanted = np.unique(np.array(self._request.restrict_features, np.int64))
        codes = codes.where(np.isin(codes.feature, wanted))
        found = discovery.measure(codes, self._kept, self._taus[site], elsewhere)
        return discovery.with_silent(found, wanted[wanted < num_features], elsewhere)

    def _background(self, site: SiteKey) -> Background | None:
        return None if self._loaded.backgrounds is None else self._loaded.backgrounds.sites[site]

    def _tau(self, site: SiteKey) -> Float64[np.ndarray, " F"]:
        rule, background = self._request.tau, self._background(site)
        if background is not None:
            return background.tau(rule.mode, rule.value or 0.0)
        constant = (rule.value or 0.0) if rule.mode == "constant" else 0.0
        return np.full(self._loaded.reader.saes[site].num_features, constant)

    def _scale(self, site: SiteKey) -> float:
        background = self._background(site)
        if self._request.normalize == "activation_norm" and self._kept.any():
            return float(self._read.norms[site.hook_point][self._kept].mean())
        if self._request.normalize == "mean_code" and background is not None:
            return background.mean_code or 1.0
        return 1.0

    def _used(self, site: SiteKey) -> UsedSae:
        return UsedSae(
            hook_point=str(site.hook_point),
            sae=site.sae,
            num_features=self._loaded.reader.saes[site].num_features,
            digest=self._loaded.reader.loaded[site].digest,
            scale=self._scale(site),
            unit=str(self._loaded.reader.loaded[site].unit),
        )

    def _analyzed(self, rankings: Sequence[Ranking]) -> Analyzed:
        request, sequence, loaded = self._request, self._sequence, self._loaded
        backgrounds = loaded.backgrounds
        if backgrounds is not None:
            subtracted = "mean over the catalog's counted tokens"
        elif (self._allowed & ~self._kept).any():
            subtracted = "mean over the tokens that were not kept"
        else:
            subtracted = "0: every token was kept"
        generation = None
        if sequence.mode == "prompt+gen":
            sampled = f"sampled, temperature {request.temperature:g}, top_p {request.top_p:g}, seed {request.seed}"
            generation = sampled if request.do_sample else "greedy"
        return Analyzed(
            mode=sequence.mode,
            tokens=len(sequence.ids),
            tokens_kept=int(self._kept.sum()),
            tokens_generated=sequence.num_generated,
            tokens_truncated=sequence.num_truncated,
            layers=sorted({site.hook_point.layer for site in self._sites}),
            streams=[s for s in STREAMS if any(site.hook_point.stream == s for site in self._sites)],
            saes=[self._used(site) for site in self._sites],
            given=sequence.given,
            text=sequence.text,
            token_filter=request.token_filter,
            topk_tokens_per_seq=request.topk_tokens_per_seq,
            first_positions=self._masks.first_positions,
            max_norm_ratio=self._masks.max_norm_ratio,
            attention_sinks=bool(self._masks.attention_sinks),
            tokens_sinks=self._num_sinks,
            tau=self._tau_rule(),
            selectivity_background=subtracted,
            score_mode=request.score_mode,
            normalize=request.normalize,
            merge_across_layers=request.merge_across_layers,
            return_top_x=request.return_top_x,
            min_coverage=request.min_coverage_pct,
            features_scored=sum(ranking.num_fired for ranking in rankings),
            features_gated=sum(ranking.num_gated for ranking in rankings),
            passing_min_coverage=_passing(rankings),
            generation=generation,
            chat_template=request.chat_template,
            catalog=None if backgrounds is None else backgrounds.digest,
            model_digest=loaded.model_digest,
            dtype=loaded.dtype,
            version=version("sae-census"),
            notes=self._notes(rankings),
        )

    def _tau_rule(self) -> str:
        rule = self._request.tau
        if rule.mode != "constant" and self._loaded.backgrounds is None:
            return "constant 0"
        return rule.mode if rule.mode in ("p95", "p95_nonzero") else f"{rule.mode} {rule.value:g}"

    def _notes(self, rankings: Sequence[Ranking]) -> list[str]:
        notes, request, backgrounds = [], self._request, self._loaded.backgrounds
        if not self._kept.any():
            notes.append("no token was kept: all are special tokens or masked")
        if self._kept_sinks:
            notes.append(
                f"{self._kept_sinks} of the kept tokens look like attention sinks by their norms; leave such tokens "
                "out with attention_sinks=true"
            )
        notes += self._gates(rankings)
        units = sorted({str(self._loaded.reader.loaded[site].unit) for site in self._sites})
        by_mean_code = request.normalize == "mean_code" and backgrounds is not None
        if len(units) > 1 and request.merge_across_layers and not by_mean_code:
            notes.append(
                f"the SAEs measure codes in several units ({'; '.join(units)}): scores of one are not on the scale of "
                "another, and the merged order mixes them; merge_across_layers=false keeps them apart"
            )
        if backgrounds is None and request.tau.mode != "constant":
            notes.append(f"tau {request.tau.mode} needs a catalog and none was given: tau is 0")
        if backgrounds is not None and backgrounds.model_digest != self._loaded.model_digest:
            notes.append("the catalog was made with another model: backgrounds are of that model")
        return notes

    def _gates(self, rankings: Sequence[Ranking]) -> list[str]:
        """Why the ranking is shorter than was asked for, and what would fill it."""
        request, notes = self._request, []
        num_fired, num_given = sum(r.num_fired for r in rankings), sum(len(r.ranked) for r in rankings)
        num_asked = request.return_top_x * len(rankings)
        if request.restrict_features:
            num_asked = min(num_asked, sum(len(r.ranked) + len(r.below) for r in rankings))
        would_pass = _passing(rankings)
        if would_pass is not None:
            advice = f"min_coverage_pct={math.floor(would_pass * 1e4) / 1e4:g} (a fraction of the kept tokens)"
            more = "" if would_pass else f" or a smaller tau (now {self._tau_rule()})"
            notes.append(
                f"{sum(r.num_gated for r in rankings)} of {num_fired} features are below "
                f"min_coverage_pct={request.min_coverage_pct:g}, and the ranking has {num_given} of the {num_asked} "
                f"that were asked for; {advice}{more} would fill it; the best of the others stand in below_gate"
            )
        if num_fired < num_asked and self._kept.any():
            left = int((self._allowed & ~self._kept).sum())
            more = f"; topk_tokens_per_seq={request.topk_tokens_per_seq} left {left} other tokens out" if left else ""
            notes.append(f"{num_fired} features fire on the kept tokens, and {num_asked} are asked for{more}")
        return notes

    def _told(self, one: _Candidate) -> dict[str, Any]:
        """The fields of a `MeasuredFeature`."""
        site, found, i = one.site, one.found, one.i
        feature = int(found.feature[i])
        label, source = self._label(site, feature)
        return {
            "feature_id": feature,
            "layer": site.hook_point.layer,
            "stream": site.hook_point.stream,
            "hook_point": str(site.hook_point),
            "sae": site.sae,
            "score": one.score,
            "scores": Scores(
                mean=float(found.mean[i]),
                coverage=float(found.coverage[i]),
                max=float(found.max[i]),
                selectivity=float(found.selectivity[i]),
            ),
            "tau": float(self._taus[site][feature]),
            "proto_label": label,
            "label_source": source,
            "catalog": self._against_catalog(site, found, i),
            "top_spans": self._spans(site, feature) if self._request.attach_examples else [],
        }

    def _label(self, site: SiteKey, feature: int) -> tuple[str | None, LabelSource | None]:
        table, background = self._loaded.labels.get(site, {}), self._background(site)
        if not self._request.attach_proto_labels:
            return None, None
        if feature in table:
            return table[feature], "table"
        if background is not None and feature in background.labels:
            return background.labels[feature]
        return None, None

    def _against_catalog(self, site: SiteKey, found: Candidates, i: int) -> AgainstCatalog | None:
        background, feature = self._background(site), int(found.feature[i])
        if background is None:
            return None
        count, tokens = int(background.stats.count[feature]), background.num_tokens
        ratio, low, high = discovery.log_odds(int(found.fired[i]), int(self._kept.sum()), count, tokens)
        return AgainstCatalog(
            frequency=count / max(tokens, 1),
            mean=float(background.mean[feature]),
            max=float(background.stats.maximum[feature]),
            percentile=discovery.percentile(background.stats, feature, float(found.max[i])),
            log_odds=ratio,
            log_odds_low=low,
            log_odds_high=high,
        )

    def _spans(self, site: SiteKey, feature: int) -> list[Span]:
        codes, sequence = self._read.codes[site], self._sequence
        low, high = np.searchsorted(codes.feature, [feature, feature + 1])
        position, value = codes.position[low:high].astype(np.int64), codes.value[low:high].astype(np.float64)
        at = self._kept[position]
        peaks, strengths = position[at], value[at]
        spans = []
        for start, stop, i in discovery.windows(
            peaks, strengths, len(sequence.ids), width=WINDOW, at_most=self._request.num_spans
        ):
            values = np.zeros(stop - start)
            inside = (position >= start) & (position < stop)
            values[position[inside] - start] = value[inside]
            begin, end = sequence.chars[start][0], sequence.chars[stop - 1][1]
            spans.append(
                Span(
                    text=sequence.text[begin:end],
                    position=[start, stop],
                    char=[begin, end],
                    act=float(strengths[i]),
                    peak=int(peaks[i]),
                    tokens=[sequence.text[first:last] for first, last in sequence.chars[start:stop]],
                    values=values.tolist(),
                )
            )
        return spans


def _passing(rankings: Sequence[Ranking]) -> float | None:
    return min((ranking.passing for ranking in rankings if ranking.passing is not None), default=None)


def allowed_tokens(loaded: Loaded, request: DiscoverRequest, sequence: Tokens) -> Bool[np.ndarray, " T"]:
    """The tokens that can be kept, as far as ids and positions tell."""
    ids, chosen = np.array([sequence.ids]), loaded.masks(request)
    rules = masks.token_rules(
        ids,
        np.array([ids.shape[1]]),
        special_ids=loaded.reader.tokenizer.special_ids,
        first_positions=chosen.first_positions,
        positions=chosen.positions,
    )
    return np.asarray(rules[0] == masks.COUNTED)
