"""Trace features upstream: which embeddings, heads, source tokens and MLPs a pre-activation is made of.

`trace_feature` splits one feature at one token; `trace` does so for many features of a catalog at their spans,
on Ray if asked to, and attaches the result to the catalog.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from torch import Tensor

from sae_census.compute.effects.linear import Split
from sae_census.config import TraceConfig
from sae_census.errors import CensusError, ConfigError
from sae_census.flows.catalog.choice import chosen_features
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.effects.origins import Origins, origins, section
from sae_census.io import report
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.model.device import choose_device
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.model.paths import Paths
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import sealed
from sae_census.steps.cluster import connected, run_tasks
from sae_census.steps.effects.tracing import Probe, SpanProbe, Tracer, TraceSettings, split
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import layout
from sae_census.steps.store.progress import RunLog, new_run
from sae_census.types import HookPoint, SiteKey

CONTEXTS_PER_TASK = 16
PAGE_FEATURES = 100
"""More features than these make no page that a browser likes; all are in the tables."""
_ORDER = ("hook_point", "sae", "feature_id", "group", "sample_rank")


def trace_feature(
    feature_idx: int, token_idx: int, model: LanguageModel, input_ids: Tensor, encoder: LoadedSae
) -> Split:
    """Split a feature's pre-activation at one token of one context.

    Args:
        feature_idx: of `encoder`.
        token_idx: the token, counted from the start of the context.
        model: in float32.
        input_ids: (T,) ids of the context; those behind the token do not matter.
        encoder: an SAE with its hook point.

    Returns:
        What embedding, positions, heads by source token, MLPs and biases add to the pre-activation, without rest.

    >>> ids = tokenizer("river water stone bridge", return_tensors="pt").input_ids[0]
    >>> split = trace_feature(42, 3, model, ids, sae)
    >>> split.heads.shape  # blocks, heads, source tokens
    (2, 4, 4)
    >>> abs(split.total - split.pre_activation) < 1e-5
    True

    Raises:
        ConfigError: if the model computes in half precision, there is no such feature, token or hook point, or an id is
            beyond the embedding.
    """
    model.check_ids(input_ids)
    probe = Probe(
        hook_point=encoder.hook_point, sae=encoder.sae.to(model.device), feature=feature_idx, position=token_idx
    )
    return split(Paths(model.inner), input_ids, [probe])[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """What a run of the job gave."""

    folder: Path
    """With sources.parquet, sources.csv, sources.html and trace.json."""
    origins: tuple[Origins, ...]
    """Of the first `PAGE_FEATURES` features, in the order they were asked for."""
    sources: tables.Table
    """The rows of this run."""
    num_features: int
    num_spans: int
    without_spans: int
    """Features that have no span in the group: they never fire."""
    failures: tuple[str, ...]
    """One sentence for each batch of spans that could not be traced."""
    dtype: str
    """That the model computed in."""
    catalog_dtype: str
    """That the catalog's codes were computed in."""
    seconds: float


def trace(config: TraceConfig, say: Callable[[str], None] | None = None) -> Tracing:
    """Split the pre-activations of features at some of their spans into what the model's parts wrote, as tables.

    Args:
        config: which catalog, features and spans.
        say: hears every line that is meant for people; by default they go to stderr.

    Returns:
        The rows of this run, how many features and spans they are of, and what could not be traced.

    Raises:
        UserError: if the catalog has no such SAE, feature or group, or model and SAEs are no longer its own.
    """
    began = time.monotonic()
    catalog = Catalog(config.store.root, config.catalog.name, config.snapshot)
    spans, without = _spans(config, catalog)
    table, failures = _traced(config, catalog, spans, say)
    asked = dict.fromkeys((str(span.site.hook_point), span.site.sae, span.feature_id) for span in spans)
    by_feature = _by_feature(table)
    rows = [by_feature[key].to_pylist() for key in [key for key in asked if key in by_feature][:PAGE_FEATURES]]
    found = tuple(map(origins, rows))
    page = report.page(
        f"Sources of features, catalog {config.catalog.name}",
        "What a feature's pre-activation is made of at the peaks of its spans: the parts add up to it. Text is shaded "
        "by what attention heads brought from each token: orange raises the feature, blue lowers it. "
        f"{len(found)} of {len(by_feature)} features are shown.",
        [section(one, mine) for one, mine in zip(found, rows, strict=True)],
    )
    return Tracing(
        folder=_publish(config, catalog, table, page),
        origins=found,
        sources=table,
        num_features=len(by_feature),
        num_spans=len(spans),
        without_spans=without,
        failures=failures,
        dtype=config.dtype,
        catalog_dtype=catalog.measure.model.dtype,
        seconds=time.monotonic() - began,
    )


def _traced(
    config: TraceConfig, catalog: Catalog, spans: Sequence[SpanProbe], say: Callable[[str], None] | None
) -> tuple[tables.Table, tuple[str, ...]]:
    """The rows of all spans, in the order of `sources.parquet`; and what failed."""
    settings = _settings(config, catalog, {span.site for span in spans})
    log = RunLog(LocalBlobs(config.store.root), layout.events(new_run()), say)
    tasks = list(_tasks(spans))
    parts, failures = [], []
    with connected(config.cluster), log.stage("trace", len(tasks), "spans") as stage:
        outcomes = run_tasks(
            partial(Tracer, settings),
            tasks,
            config.cluster,
            needs_gpu=choose_device(config.device).type == "cuda",
            on_event=log.event,
        )
        for outcome in outcomes:
            if outcome.result is None:
                failures.append(f"{len(outcome.task)} spans of shard {outcome.task[0].shard_id}: {outcome.message}")
                log.say(f"left out: {failures[-1]}")
            else:
                parts.append(tables.from_ipc(outcome.result))
            stage.advance(len(outcome.task))
    if not parts:
        raise CensusError(f"nothing could be traced: {failures[0]}")
    table = tables.joined(schemas.SOURCES, parts)
    return table.sort_by([(name, "ascending") for name in _ORDER]), tuple(failures)


def _spans(config: TraceConfig, catalog: Catalog) -> tuple[list[SpanProbe], int]:
    """The spans to trace, by SAE and rank of the feature; and how many chosen features have none."""
    groups = catalog.manifest.span_groups
    if config.group not in groups:
        raise ConfigError(f"group is {config.group!r}; catalog {config.catalog.name!r} has {', '.join(groups)}")
    spans: list[SpanProbe] = []
    without = 0
    for hook_point, sae, feature_id in chosen_features(config, catalog):
        rows = catalog.spans(hook_point, sae, feature_id, [config.group]).slice(0, config.spans).to_pylist()
        without += not rows
        site = SiteKey(HookPoint.parse(hook_point), sae)
        names = ("feature_id", "group", "sample_rank", "shard_id", "context_id", "position", "value")
        spans += [SpanProbe(site=site, **{name: row[name] for name in names}) for row in rows]
    if not spans:
        raise ConfigError(f"none of the {without} chosen features has a span in the group {config.group}")
    return spans, without


def _settings(config: TraceConfig, catalog: Catalog, sites: set[SiteKey]) -> TraceSettings:
    """Model and SAEs of the catalog; the workers prove that they are those that made it."""
    made = catalog.config
    model = made.model.model_copy(update={"dtype": config.dtype, "device": config.device})
    saes = [one for one in made.saes if sites & load_saes([one]).keys()]
    return TraceSettings(
        root=config.store.root,
        preparation_id=catalog.manifest.preparation_id,
        model=model,
        saes=tuple(saes),
        threads=config.cluster.threads_per_worker,
        num_pairs=config.pairs,
        planned=catalog.provenance.only(sites),
    )


def _tasks(spans: Sequence[SpanProbe]) -> Iterator[tuple[SpanProbe, ...]]:
    """Spans grouped so that a context is run once, whatever is traced in it; a task stays in its shard."""

    def address(span: SpanProbe) -> tuple[str, int]:
        return span.shard_id, span.context_id

    ordered = sorted(spans, key=address)
    for _, in_shard in groupby(ordered, key=lambda span: span.shard_id):
        contexts = [tuple(group) for _, group in groupby(in_shard, key=address)]
        for first in range(0, len(contexts), CONTEXTS_PER_TASK):
            yield tuple(span for group in contexts[first : first + CONTEXTS_PER_TASK] for span in group)


def _by_feature(table: tables.Table) -> dict[tuple[str, str, int], tables.Table]:
    """The rows of each feature, from a table in which they stand together."""
    found, start = {}, 0
    for group in table.group_by(_ORDER[:3], use_threads=False).aggregate([([], "count_all")]).to_pylist():
        key = group["hook_point"], group["sae"], group["feature_id"]
        found[key] = table.slice(start, group["count_all"])
        start += group["count_all"]
    return found


def _publish(config: TraceConfig, catalog: Catalog, table: tables.Table, page: bytes) -> Path:
    """Write the results; features that an earlier run traced keep their rows in the Parquet file."""
    blobs = LocalBlobs(config.out or catalog.attached)
    whole = _by_feature(table)
    if blobs.exists("sources.parquet"):
        whole = _by_feature(tables.read(blobs.path("sources.parquet"))) | whole
    files = {
        "sources.parquet": tables.to_bytes(tables.joined(schemas.SOURCES, [whole[key] for key in sorted(whole)])),
        "sources.csv": tables.csv_bytes(table),
        "sources.html": page,
    }
    for name, body in files.items():
        blobs.put(name, body)
    facts = {
        "catalog_digest": catalog.digest,
        "snapshot": catalog.number,
        "config": config.model_dump(mode="json"),
        "made_at": time.time(),
        "dtype": config.dtype,
        "files": {name: hashlib.sha256(body).hexdigest() for name, body in files.items()},
    }
    blobs.put("trace.json", sealed(facts))
    return blobs.root
