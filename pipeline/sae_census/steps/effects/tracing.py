"""Trace features at tokens: where, upstream, does a pre-activation come from? The unit of `sae-census trace`.

One whole context is run at a time, so a split does not depend on what is traced beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_census.compute.effects import linear, tangent
from sae_census.compute.effects.linear import Split
from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.config import ModelConfig, SaeConfig
from sae_census.errors import ConfigError, ShardError
from sae_census.io.model import device
from sae_census.io.model.device import choose_device
from sae_census.io.model.paths import Paths
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import Reader
from sae_census.steps.store import layout
from sae_census.types import HookPoint, SiteKey

TOLERANCE = 1e-3
"""Parts whose sum misses the pre-activation by more than this share of their magnitudes are not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One feature at one token of a context."""

    hook_point: HookPoint
    sae: SparseAutoencoder
    feature: int
    position: int


def split(paths: Paths, input_ids: Tensor, probes: Sequence[Probe]) -> list[Split]:
    """Split the pre-activations of some features at some tokens of one context, from one forward pass.

    Args:
        paths: of a model in float32 or float64; half precision would not add up.
        input_ids: (T,) ids of the context; tokens behind a probe's are no sources of it.
        probes: features of SAEs on the model's device.

    Raises:
        ConfigError: if the model computes in half precision, or a probe names no feature or token.
        ShardError: if the parts do not add up to the pre-activation: the model has a path we do not know.
    """
    if paths.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"tracing needs a model in float32, this one computes in {paths.dtype}; use model.dtype=float32"
        )
    for probe in probes:
        if not 0 <= probe.position < len(input_ids):
            raise ConfigError(f"position {probe.position} is outside the context, which has 0 to {len(input_ids) - 1}")
        if not 0 <= probe.feature < probe.sae.num_features:
            raise ConfigError(f"there is no feature {probe.feature}; the SAE has 0 to {probe.sae.num_features - 1}")
    positions = sorted({probe.position for probe in probes})
    readings = paths.read(input_ids, {probe.hook_point for probe in probes}, positions)
    splits = []
    for probe in probes:
        query = positions.index(probe.position)
        one = _split_one(paths, readings.writes, readings.streams, probe, query)
        rest = abs(one.total - one.pre_activation)
        if not rest <= TOLERANCE * one.magnitude:
            raise ShardError(
                f"the parts of feature {probe.feature} at {probe.hook_point}, position {probe.position}, add up to "
                f"{one.total:.6g}, but its pre-activation is {one.pre_activation:.6g}"
            )
        splits.append(one)
    return splits


def _split_one(
    paths: Paths, writes: linear.ResidualWrites, streams: dict[HookPoint, Tensor], probe: Probe, query: int
) -> Split:
    point = probe.hook_point
    here = streams[point][query]
    read, constant = linear.read_out(probe.sae, here, probe.feature)
    value = float(here.double() @ read) + constant
    base = paths.base_of(point)
    if base is None:
        heads, bias = read.unflatten(0, (paths.num_heads, -1)), 0.0
        if point.stream == "attn_out":
            heads, bias = writes.attention[point.layer].pull(read, query)
        return linear.split_attention(
            writes, query, heads, layer=point.layer, pre_activation=value, bias=bias, sae_bias=constant
        )
    intercept = 0.0
    if base != point:
        at = streams[base][query]
        tail = paths.tail(point, at[None])
        behind = read
        _, read = tangent.slope(lambda x: tail(x).double() @ behind, at)
        intercept = value - constant - float(at.double() @ read)
    return linear.split_stream(
        writes,
        query,
        read,
        num_attention=base.layer + (base.stream != "resid_pre"),
        num_mlps=base.layer + (base.stream == "resid_post"),
        pre_activation=value,
        sae_bias=constant,
        intercept=intercept,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What a worker needs to trace any span of a catalog."""

    root: str
    preparation_id: str
    model: ModelConfig
    saes: tuple[SaeConfig, ...]
    threads: int
    num_pairs: int
    planned: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanProbe:
    """A feature at the peak of one of its spans."""

    site: SiteKey
    feature_id: int
    group: str
    sample_rank: int
    shard_id: str
    context_id: int
    position: int
    value: float
    """The code in the catalog."""


class Tracer:
    """What runs in each worker of `sae-census trace`."""

    def __init__(self, settings: TraceSettings):
        self._settings = settings
        device.configure(settings.threads, choose_device(settings.model.device))
        self._blobs = LocalBlobs(settings.root)
        self._reader = Reader(settings.model, settings.saes, settings.planned)
        self._paths = Paths(self._reader.model.inner)
        self._reader.drop_above()

    def run(self, task: tuple[SpanProbe, ...]) -> bytes:
        """The rows of `sources.parquet` of some spans of one shard, by context, as Arrow bytes."""
        path = self._blobs.path(layout.shard(self._settings.preparation_id, task[0].shard_id))
        contexts = tables.read(path, ["input_ids"]).column(0)
        rows: list[dict[str, object]] = []
        for context_id in sorted({span.context_id for span in task}):
            spans = [span for span in task if span.context_id == context_id]
            input_ids = contexts[context_id].as_py()
            words = self._reader.tokenizer.token_texts([input_ids])[0]
            probes = [
                Probe(
                    hook_point=span.site.hook_point,
                    sae=self._reader.saes[span.site],
                    feature=span.feature_id,
                    position=span.position,
                )
                for span in spans
            ]
            for span, one in zip(spans, split(self._paths, torch.tensor(input_ids), probes), strict=True):
                rows += span_rows(span, one, words, self._settings.num_pairs)
        return tables.ipc_bytes(tables.from_rows(schemas.SOURCES, rows))


def span_rows(span: SpanProbe, one: Split, words: Sequence[str], num_pairs: int) -> list[dict[str, object]]:
    """The rows of `sources.parquet` of one span.

    Args:
        span: which.
        one: its split.
        words: the text of every token of its context.
        num_pairs: how many `head_source` rows.
    """
    address = {
        "hook_point": str(span.site.hook_point),
        "sae": span.site.sae,
        "feature_id": span.feature_id,
        "group": span.group,
        "sample_rank": span.sample_rank,
        "shard_id": span.shard_id,
        "context_id": span.context_id,
        "position": span.position,
        "value": span.value,
        "pre_activation": one.pre_activation,
    }
    return [
        address
        | {
            "kind": part.kind,
            "layer": part.layer,
            "head": part.head,
            "source_position": part.source,
            "source_token": None if part.source is None else words[part.source],
            "contribution": part.contribution,
        }
        for part in linear.parts(one, num_pairs)
    ]
