"""A tick of scheduled runs: what is due runs, is recorded, and raises an alarm if it drifted.

Nothing here waits: cron, a Kubernetes CronJob or a Ray job calls it. One entry's failure does not stop the rest;
a failed run does not count, so the next tick tries again. Entries of one store share preparations; those that differ
in their SAEs alone share the forward passes.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from sae_census.compute.census import due
from sae_census.compute.numbers.drift import overlap, rank_correlation
from sae_census.config import AnalyzeConfig, SweepConfig
from sae_census.config.sweep import AlertConfig, EntryConfig
from sae_census.errors import CensusError, ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import Analysis, analyze
from sae_census.flows.census.fill import fill
from sae_census.flows.census.identity import settled
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.store.ledger import Ledger, SweepRun
from sae_census.types import SiteKey

_BEST = 100
_NOT_SHARED = {"saes", "catalog", "ranking", "logits", "report"}
"""Sections in which entries may differ that share forward passes."""


def is_due(entry: EntryConfig, last: datetime | None, now: datetime) -> bool:
    """Whether an entry's rule asks for a run."""
    if entry.period is not None:
        return due.every_is_due(entry.period, last, now)
    return due.cron_is_due(entry.cron or "", entry.timezone, last, now)


def sweep(config: SweepConfig, now: datetime | None = None, say: Callable[[str], None] = print) -> list[SweepRun]:
    """Run what is due.

    Args:
        config: of the sweep.
        now: the clock; by default the real one.
        say: hears what happens.

    Raises:
        ConfigError: if an entry's config is wrong; then none runs.
    """
    now, config = now or datetime.now(UTC), _with_file(config)
    configs = {name: _config(config, name) for name in config.entries}
    ledger = Ledger(LocalBlobs(config.store.root))
    chosen = [name for name in config.entries if not config.only or name in config.only]
    due_now = []
    for name in chosen:
        last = max((run.started_at for run in ledger.runs(name) if run.status != "failed"), default=None)
        if config.force or is_due(config.entries[name], last, now):
            due_now.append(name)
        else:
            say(f"{name}: not due (last run {last:%Y-%m-%d %H:%M %Z})")
    _fill_together({name: configs[name] for name in due_now}, say)
    runs = []
    for name in due_now:
        say(f"{name}: runs")
        run = _run(name, config.entries[name], configs[name], now, say)
        ledger.add(run)
        runs.append(run)
        say(f"{name}: {run.status}{f': {run.message}' if run.message else ''}")
        for alert in run.alerts:
            say(f"{name}: ALERT {alert}")
    return runs


def _with_file(config: SweepConfig) -> SweepConfig:
    """The sweep that the config's file describes, under the keys that were set beside it."""
    if config.file is None:
        return config
    try:
        content = yaml.safe_load(Path(config.file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the sweep {config.file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    plain = SweepConfig()
    keys = [name for name in SweepConfig.model_fields if name != "file"]
    said = {name: getattr(config, name) for name in keys if getattr(config, name) != getattr(plain, name)}
    try:
        return SweepConfig.model_validate((content if isinstance(content, dict) else {"entries": content}) | said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{config.file}: {where} is {first['input']!r:.80}: {first['msg']}") from error


def _config(config: SweepConfig, name: str) -> AnalyzeConfig:
    keys = _merged(config.shared, config.entries[name].config)
    keys = _merged({"catalog": {"name": name}}, keys) | {"store": config.store.model_dump()}
    try:
        return AnalyzeConfig.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"entry {name}: {key} is {first['input']!r:.80}: {first['msg']}") from error


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections key by key; anything else whole."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key != "source"
        result[key] = _merged(result[key], value) if both else value
    return result


def _run(name: str, entry: EntryConfig, config: AnalyzeConfig, now: datetime, say: Callable[[str], None]) -> SweepRun:
    catalog = config.catalog.name
    before = _newest(config)
    facts: dict[str, Any] = {"status": "failed", "snapshot": None, "digest": None, "message": ""}
    statistics: dict[str, float] = {}
    try:
        analysis = analyze(config, lambda line: say(f"{name}: {line}"))
    except CensusError as error:
        facts["message"] = str(error)
    except Exception as error:  # noqa: BLE001  # whatever one entry raises must not stop the rest
        facts["message"] = f"{type(error).__name__}: {error}"
    else:
        facts = _facts(analysis)
        if before is not None and analysis.is_new:
            statistics = drift(before, analysis.catalog)
    return SweepRun(
        entry=name,
        started_at=now,
        finished_at=datetime.now(UTC),
        catalog=catalog,
        statistics=statistics,
        alerts=[text for alert in entry.alerts if (text := _alarm(alert, statistics))],
        **facts,
    )


def _fill_together(configs: Mapping[str, AnalyzeConfig], say: Callable[[str], None]) -> None:
    """Make the partials of all entries that differ in their SAEs alone with one forward pass for each batch of text."""
    groups: dict[str, list[str]] = {}
    configs = {name: settled(config) for name, config in configs.items()}  # an older name keeps its masks
    for name, config in configs.items():
        groups.setdefault(config.model_dump_json(exclude=_NOT_SHARED), []).append(name)
    for names in groups.values():
        saes = {one.model_copy(update={"name": None}): one for name in names for one in configs[name].saes}
        if len(saes) == len(configs[names[0]].saes):
            continue
        # A partial knows of no name, so these only have to differ.
        named = tuple(one.model_copy(update={"name": f"sae_{i}"}) for i, one in enumerate(saes))
        say(f"{', '.join(names)}: share their forward passes")
        try:
            fill(configs[names[0]].model_copy(update={"saes": named}), names, say)
        except Exception as error:  # noqa: BLE001  # each entry tries on its own next, and records its own reason
            say(f"{', '.join(names)}: cannot share ({type(error).__name__}: {error})")


def _facts(analysis: Analysis) -> dict[str, Any]:
    status = "partly" if analysis.failures else "done" if analysis.is_new else "unchanged"
    message = f"{len(analysis.failures)} shards failed" if analysis.failures else ""
    return {
        "status": status,
        "snapshot": analysis.catalog.number,
        "digest": analysis.catalog.digest,
        "message": message,
    }


def _newest(config: AnalyzeConfig) -> Catalog | None:
    try:
        return Catalog(config.store.root, config.catalog.name)
    except ConfigError:
        return None


def drift(old: Catalog, new: Catalog) -> dict[str, float]:
    """The statistics that alerts can bound, each of the SAE where it is worst.

    Args:
        old: a snapshot.
        new: a later one of the same features.
    """
    worst: dict[str, float] = {}
    for site in sorted(set(old.saes) & set(new.saes)):
        for name, value in _site_drift(old, new, SiteKey.parse(site)).items():
            low = name in ("rank_correlation", "overlap_100")
            if value is not None:
                worst[name] = min(worst.get(name, value), value) if low else max(worst.get(name, value), value)
    return worst


def _site_drift(old: Catalog, new: Catalog, site: SiteKey) -> dict[str, float | None]:
    columns = ("score", "frequency", "dead")
    a, b = ({c: np.asarray(t.of_sae(str(site.hook_point), site.sae)[c]) for c in columns} for t in (old, new))
    alive = ~a["dead"] & ~b["dead"]
    shift = np.abs(np.log2(b["frequency"][alive] / a["frequency"][alive]))
    fit_a, fit_b = (one.manifest.fraction_of_variance_unexplained.get(str(site)) for one in (old, new))
    return {
        "rank_correlation": rank_correlation(a["score"], b["score"]),
        "overlap_100": overlap(a["score"], b["score"], [min(_BEST, len(a["score"]))])[min(_BEST, len(a["score"]))],
        "dead_share_change": float(b["dead"].mean() - a["dead"].mean()),
        "frequency_shift": float(np.median(shift)) if len(shift) else None,
        "fvu_change": None if fit_a is None or fit_b is None else fit_b - fit_a,
    }


def _alarm(alert: AlertConfig, statistics: Mapping[str, float]) -> str | None:
    """What is out of bounds, in words; None if nothing is, or nothing is known."""
    value = statistics.get(alert.statistic)
    if value is None:
        return None
    if alert.below is not None and value < alert.below:
        return f"{alert.statistic} is {value:.4g}, below {alert.below:g}"
    if alert.above is not None and value > alert.above:
        return f"{alert.statistic} is {value:.4g}, above {alert.above:g}"
    return None
