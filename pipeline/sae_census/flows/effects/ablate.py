"""Ablate features of a catalog: zero each over a sample of its spans, and write down what that did.

What a catalog says of a feature is correlation: where it fires. This adds a cause: what the model predicts worse
without it. The table joins the catalog's by its key and lies beside the snapshots, which stay as they are.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.compute.effects.effects import mean_interval
from sae_census.config import AblateConfig, AnalyzeConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.choice import chosen_features
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.model.device import choose_device
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.cluster import run_tasks
from sae_census.steps.effects.ablation import Ablation, AblationTask, Ablator, SpanAddress
from sae_census.steps.model.parts import tokenizer_of
from sae_census.steps.store import layout
from sae_census.types import HookPoint, SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablations:
    """What came of it."""

    table: tables.Table
    """One row a feature, sorted by key."""
    path: Path
    """Where the table was written."""
    skipped: tuple[str, ...]
    """Features without a span in the group, one sentence each."""
    failures: tuple[str, ...]
    """Features that could not be ablated, one sentence each."""


def ablate(config: AblateConfig, say: Callable[[str], None] = lambda text: None) -> Ablations:
    """Zero features of a catalog, one at a time, over a sample of their spans, and measure what the model loses.

    Args:
        config: which catalog, features and spans.
        say: hears one line for every feature that is done.

    Returns:
        A table with one row a feature: its mean code, and what its ablation changes of the next-token loss (nats) and
        of the logits of its tokens, each with an interval and beside a control, an equal step along another feature.
        Also where the table was written, and what was skipped or failed.

    >>> from sae_census import AblateConfig
    >>> config = AblateConfig(
    ...     store={"root": root}, catalog={"name": "default"}, hook_point="blocks.1.hook_resid_post",
    ...     best=1, spans=2, cluster={"executor": "inline"},
    ... )
    >>> done = ablate(config)
    >>> done.table.num_rows, done.path.suffix, done.failures
    (1, '.parquet', ())

    Raises:
        UserError: if there is no such catalog or feature, or the model or an SAE is not the one it was made with.
    """
    catalog = Catalog(config.store.root, config.catalog.name, config.snapshot)
    how = _settings(config, catalog)
    tasks, values, skipped = _tasks(config, catalog, how)
    make = partial(
        Ablator,
        how,
        catalog.manifest.preparation_id,
        catalog.provenance,
        num_rows=config.contexts,
        num_tokens=config.num_tokens,
        seed=config.seed,
    )
    tokenizer = tokenizer_of(how.model)
    needs_gpu = choose_device(how.model.device).type == "cuda"
    rows: dict[AblationTask, dict[str, Any]] = {}
    failures = []
    for outcome in run_tasks(make, tasks, config.cluster, needs_gpu=needs_gpu):
        task: AblationTask = outcome.task
        name = f"feature {task.feature_id} of {task.site}"
        if outcome.result is None:
            failures.append(f"{name}: {outcome.kind}: {outcome.message}")
        else:
            rows[task] = _row(config, task, outcome.result, values[task], tokenizer) | {
                "catalog_digest": catalog.digest,
                "dtype": how.model.dtype,
            }
        say(f"{len(rows) + len(failures)} of {len(tasks)}: {name}")
    if not rows:
        raise ConfigError(f"no feature could be ablated: {'; '.join([*failures, *skipped])}")
    columns = {field: [rows[task][field] for task in tasks if task in rows] for field in schemas.ABLATIONS.names}
    table = tables.table(schemas.ABLATIONS, columns)
    body = tables.to_bytes(table)
    blobs = LocalBlobs(config.store.root)
    key = layout.ablation(config.catalog.name, catalog.number, hashlib.sha256(body).hexdigest()[:16])
    blobs.put_if_absent(key, body)
    return Ablations(table=table, path=blobs.path(key), skipped=tuple(skipped), failures=tuple(sorted(failures)))


def _settings(config: AblateConfig, catalog: Catalog) -> AnalyzeConfig:
    """The catalog's own settings, with today's store and cluster."""
    now = {"store": config.store.model_dump(), "cluster": config.cluster.model_dump()}
    how = AnalyzeConfig.model_validate(catalog.manifest.config | now)
    dtype = catalog.measure.model.dtype if config.dtype == "auto" else config.dtype
    return how.model_copy(update={"model": how.model.model_copy(update={"dtype": dtype})})


def _tasks(
    config: AblateConfig, catalog: Catalog, how: AnalyzeConfig
) -> tuple[list[AblationTask], dict[AblationTask, list[float]], list[str]]:
    """The work, sorted by key; for each task the catalog's codes at the peaks; and what has no spans."""
    groups = catalog.manifest.span_groups
    if config.group not in groups or config.group == "non_activating":
        raise ConfigError(
            f"group is {config.group}; expected one of {', '.join(g for g in groups if g != 'non_activating')}"
        )
    tasks, values, skipped = [], {}, []
    for key in sorted(set(chosen_features(config, catalog))):
        hook_point, sae, feature_id = key
        spans = catalog.spans(*key, [config.group]).to_pylist()
        found = sorted(spans, key=lambda span: int(span["sample_rank"]))[: config.spans]
        if not found:
            skipped.append(f"feature {feature_id} of {hook_point}/{sae} has no {config.group} spans")
            continue
        task = AblationTask(
            site=SiteKey(HookPoint.parse(hook_point), sae),
            feature_id=feature_id,
            spans=tuple(_address(span) for span in found),
            token_ids=_top_tokens(config, catalog, key) if config.top_tokens == "catalog" else None,
        )
        tasks.append(task)
        values[task] = [float(span["value"]) for span in found]
    return tasks, values, skipped


def _address(span: dict[str, Any]) -> SpanAddress:
    return SpanAddress(**{name: span[name] for name in SpanAddress.__dataclass_fields__})


def _top_tokens(config: AblateConfig, catalog: Catalog, key: tuple[str, str, int]) -> tuple[int, ...]:
    rows = [row for row in catalog.logits(*key).to_pylist() if row["sign"] == "positive"]
    rows.sort(key=lambda row: int(row["rank"]))
    return tuple(int(row["token_id"]) for row in rows[: config.num_tokens])


def _row(
    config: AblateConfig, task: AblationTask, result: Ablation, values: Sequence[float], tokenizer: Tokenizer
) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {
        "hook_point": str(task.site.hook_point),
        "sae": task.site.sae,
        "feature_id": task.feature_id,
        "group": config.group,
        "spans": len(task.spans),
        "code": float(np.mean(values)),
        "code_deviation": float(np.max(np.abs(result.codes - values) / np.abs(values))),
        "loss_spans": len(result.loss),
        "logit_spans": len(result.logit),
        "confidence": config.confidence,
        "top_tokens": config.top_tokens,
        "token_ids": list(result.token_ids),
        "tokens": tokenizer.tokens(result.token_ids),
    }
    measured = {
        "loss": result.loss,
        "control_loss": result.control_loss,
        "excess_loss": result.loss - result.control_loss,
        "logit": result.logit,
        "control_logit": result.control_logit,
        "excess_logit": result.logit - result.control_logit,
    }
    for name, changes in measured.items():
        interval = mean_interval(changes, config.confidence)
        row |= {
            f"{name}_change": interval.mean,
            f"{name}_change_low": interval.low,
            f"{name}_change_high": interval.high,
        }
    return row
