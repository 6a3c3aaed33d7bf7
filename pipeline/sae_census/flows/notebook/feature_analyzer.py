"""The corpus engine's statistics for people who bring their own stream of activations.

The first pass counts, and keeps contexts where no maximum is needed (proportions 1 and 0). If a proportion lies
between, the stream is read a second time and contexts are judged against the final maximum of the first: exact,
in memory that does not grow with the stream, and the same whatever the order of contexts.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from sae_census.compute.notebook.subsamples import Chosen, Context, Gatherer
from sae_census.compute.numbers import stats as statistics
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.config import FeatureAnalyzerConfig
from sae_census.errors import ConfigError
from sae_census.flows.notebook.activation_stream import ADDRESS, Coded, Reading, Stream, opener
from sae_census.flows.notebook.encoders import Batch, Encoder, encoder_of
from sae_census.flows.notebook.post_analysis import PostAnalysis, post_analysis_of

QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A subsample of the config."""

    name: str
    proportion: float
    num_samples: int
    max_length: int | None

    @property
    def group(self) -> Literal["top", "low_activating", "non_activating"]:
        """What it holds, whatever its name."""
        if self.proportion == 1:
            return "top"
        return "low_activating" if self.proportion > 0 else "non_activating"

    def gather(self, gatherer: Gatherer, coded: Coded, maximum: Float32[np.ndarray, " F"] | None) -> None:
        """Consider a batch; low-activating contexts are judged against `maximum`."""
        match self.group:
            case "top":
                gatherer.add_strongest(coded.codes, coded.contexts, None)
            case "low_activating":
                assert maximum is not None
                # float32 like the codes, so that a context at exactly the proportion is eligible
                limit = maximum * np.float32(self.proportion)
                gatherer.add_strongest(coded.codes, coded.contexts, limit)
            case "non_activating":
                gatherer.add_silent(coded.codes, coded.contexts, coded.counted)


class FeatureAnalyzer:
    """Counts and samples the features of an SAE over a stream of activations.

    >>> from sae_census import FeatureAnalyzerConfig
    >>> tokens = torch.arange(3, 19).view(2, 8)
    >>> batch = {"blocks.1.hook_resid_post": torch.ones(2, 8, 32), "tokens": tokens}
    >>> cfg = FeatureAnalyzerConfig(
    ...     total_analyzing_tokens=16, ignore_token_ids=[3], subsamples={"top": {"proportion": 1.0, "n_samples": 2}}
    ... )
    >>> found = FeatureAnalyzer(cfg).analyze_chunk([batch], sae)
    >>> len(found), found[0]["n_analyzed_tokens"]  # one of 16 tokens is ignored
    (96, 15)
    """

    def __init__(self, cfg: FeatureAnalyzerConfig):
        """Keep the settings.

        Args:
            cfg: how much is read, what counts and what is kept.
        """
        self.cfg = cfg

    def compute_ignore_token_masks(self, tokens: Tensor, ignore_token_ids: Sequence[int] | None = None) -> Tensor:
        """Which tokens count: True where the token is none of the ignored ones.

        Without a list every token counts, padding included, and a UserWarning says so; an empty list says it
        on purpose.
        """
        if ignore_token_ids is None:
            warnings.warn(
                "no ignore_token_ids are given, so every token counts, padding included; give an empty list to "
                "say that this is meant",
                UserWarning,
                stacklevel=2,
            )
        ignored = torch.tensor(list(ignore_token_ids or ()), dtype=tokens.dtype, device=tokens.device)
        return ~torch.isin(tokens, ignored)

    def get_post_analysis_func(self, sae_type: str) -> PostAnalysis:
        """The processor of an SAE type; the generic one, which adds nothing, if none is registered."""
        return post_analysis_of(sae_type)

    def analyze_chunk(
        self,
        activation_factory: Stream,
        sae: Any,
        device_mesh: None = None,
        activation_factory_process_kwargs: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Statistics and samples of every feature.

        A token counts if it is none of `ignore_token_ids`; without these, if the batch's `mask` is True there; a
        feature fires where its code is above 0. Batches stop with the one that reaches
        `total_analyzing_tokens`, ignored tokens included.

        Args:
            activation_factory: an object with `process(**kwargs)`, a function, or batches; mappings with
                activations (B, T, D) by hook point, `tokens` (B, T), and optionally `mask` (B, T; True counts)
                and `meta`, a mapping for each context. `context_idx` and `shard_idx` in it order ties; without a
                `context_idx` contexts are numbered as they come.
            sae: as `sae_census.flows.notebook.encoders.encoder_of` takes it.
            device_mesh: must be None. Split the SAE by features (not a TopK one) or the stream instead.
            activation_factory_process_kwargs: for `process`, or for the function.

        Returns:
            For each feature: `act_times` (counted tokens it fires on), `n_analyzed_tokens` (counted tokens),
            `max_feature_acts`; `context_count`, `frequency`, `mean` and `std` over counted tokens,
            `mean_when_firing`, and over firing tokens `p50`, `p95`, `p99` (`QUANTILE_ERROR`); what the
            post-analysis of the SAE's type adds; and `samplings`, one mapping for each subsample: `name`, `group`
            (top, low_activating or non_activating), `feature_acts_indices` (2, N) of sample and position,
            `feature_acts_values` (N), `start` and `stop` of each sample's window, and the metadata by key, arrays
            of numbers and lists of everything else. Positions count from the start of the context. Samples come
            best first, equal ones by shard_idx and context_idx. There may be fewer than asked for: only contexts
            in which the feature fires are samples of a proportion above 0, and one that never fires has none.

        Raises:
            ConfigError: if SAE, stream and config do not fit, or the stream's second pass differs from its first.
            ShardError: if activations or codes of counted tokens are NaN or infinite, or too large to be summed.
            NotImplementedError: for SAEs of type lorsa.
        """
        if device_mesh is not None:
            raise ConfigError("device_mesh is given; expected None: split the SAE's features or the stream instead")
        encoder = encoder_of(sae, self.cfg.clt_layer)
        with torch.no_grad():
            extras = self.get_post_analysis_func(encoder.sae_type)(sae, self.cfg)
        rules = self._rules()
        judged = [rule for rule in rules if rule.group == "low_activating"]
        opened = opener(activation_factory, activation_factory_process_kwargs or {}, twice=bool(judged))
        first = self._reading(encoder)
        stats, gatherers = self._count(first.of(opened()), first, rules)
        if judged:
            second = self._reading(encoder)
            for coded in second.of(opened()):
                for rule in judged:
                    rule.gather(gatherers[rule.name], coded, stats.maximum)
            _check_same(first, second)
        alive = stats.count > 0
        chosen = [(rule, gatherers[rule.name].chosen(rule.max_length, alive)) for rule in rules]
        return _results(_columns(stats, first.tokens_counted) | dict(extras), chosen)

    def _rules(self) -> list[_Rule]:
        return [
            _Rule(
                name=name,
                proportion=float(chosen["proportion"]),
                num_samples=int(chosen["n_samples"]),
                max_length=int(chosen["max_length"]) if "max_length" in chosen else None,
            )
            for name, chosen in self.cfg.subsamples.items()
        ]

    def _reading(self, encoder: Encoder) -> Reading:
        return Reading(
            encoder=encoder, keep=self._counted, max_tokens=self.cfg.total_analyzing_tokens, seed=self.cfg.seed
        )

    def _counted(self, batch: Batch) -> Tensor:
        """Which tokens of a batch count, (B, T)."""
        if self.cfg.ignore_token_ids is None and batch.get("mask") is not None:
            return torch.as_tensor(batch["mask"]).bool()
        return self.compute_ignore_token_masks(torch.as_tensor(batch["tokens"]), self.cfg.ignore_token_ids)

    def _count(
        self, batches: Iterable[Coded], reading: Reading, rules: Sequence[_Rule]
    ) -> tuple[FeatureStats, dict[str, Gatherer]]:
        """The first pass: statistics, and the gatherers of all rules, filled where no maximum is needed."""
        stats: FeatureStats | None = None
        gatherers: dict[str, Gatherer] = {}
        for coded in batches:
            if stats is None:
                stats = FeatureStats.zero(reading.num_features)
                gatherers = {rule.name: Gatherer(reading.num_features, rule.num_samples) for rule in rules}
            stats.add(coded.codes)
            for rule in rules:
                if rule.group != "low_activating":
                    rule.gather(gatherers[rule.name], coded, None)
        if stats is None:
            raise ConfigError("the stream gave no batches; expected mappings with tokens and activations")
        return stats, gatherers


def _check_same(first: Reading, second: Reading) -> None:
    if (first.num_contexts, first.fingerprint) != (second.num_contexts, second.fingerprint):
        raise ConfigError(
            f"the stream's second pass gave {second.num_contexts} contexts, the first {first.num_contexts}, or others "
            "than before; a proportion between 0 and 1 needs a stream that can be read twice alike"
        )


def _columns(stats: FeatureStats, tokens_counted: int) -> dict[str, np.ndarray]:
    columns = {
        "act_times": stats.count,
        "n_analyzed_tokens": np.full(len(stats.count), tokens_counted),
        "max_feature_acts": stats.maximum,
        "context_count": stats.context_count,
        "frequency": stats.count / max(tokens_counted, 1),
        "mean": statistics.mean(stats, tokens_counted),
        "mean_when_firing": statistics.mean(stats, stats.count),
        "std": statistics.deviation(stats, tokens_counted),
    }
    return columns | {name: statistics.quantile(stats, q) for name, q in QUANTILES}


def _results(columns: Mapping[str, np.ndarray], chosen: Sequence[tuple[_Rule, Chosen]]) -> list[dict[str, Any]]:
    num_features = len(columns["act_times"])
    for name, column in columns.items():
        if len(column) != num_features:
            raise ConfigError(f"post-analysis gave {name} for {len(column)} features; expected {num_features}")
    metadata = [_metadata(kept.contexts) for _, kept in chosen]
    return [
        {name: column[f].item() if column.ndim == 1 else column[f] for name, column in columns.items()}
        | {"samplings": [_sampling(*one, said, f) for one, said in zip(chosen, metadata, strict=True)]}
        for f in range(num_features)
    ]


def _sampling(rule: _Rule, kept: Chosen, metadata: Mapping[str, np.ndarray], feature: int) -> dict[str, Any]:
    samples = slice(*kept.feature_start[feature : feature + 2])
    bounds = kept.code_start[samples.start : samples.stop + 1]
    codes = slice(bounds[0], bounds[-1])
    sample = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    said = {key: column[kept.context[samples]] for key, column in metadata.items()}
    return {
        "name": rule.name,
        "group": rule.group,
        "feature_acts_indices": np.stack([sample, kept.position[codes].astype(np.int64)]),
        "feature_acts_values": kept.value[codes],
        "start": kept.start[samples],
        "stop": kept.stop[samples],
        **{key: values.tolist() if values.dtype == object else values for key, values in said.items()},
    }


def _metadata(contexts: Sequence[Context]) -> dict[str, np.ndarray]:
    """By key, numbers as such and everything else as objects; None where a context lacks the key."""
    columns = {}
    for key in dict.fromkeys(key for context in contexts for key in context.metadata):
        values = [context.metadata.get(key) for context in contexts]
        if all(isinstance(value, int | float) for value in values):
            columns[key] = np.array(values)
        else:
            columns[key] = np.empty(len(values), object)
            columns[key][:] = values
    return columns or dict.fromkeys(ADDRESS, np.zeros(0, np.int64))
