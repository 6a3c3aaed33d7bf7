"""What tables and arrays say of the merged statistics of a range."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64

from sae_census.compute.numbers import stats as statistics
from sae_census.compute.numbers.documents import DocumentStats
from sae_census.compute.numbers.stats import FeatureStats
from sae_census.io.store import schemas, tables
from sae_census.types import SiteKey

QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


def feature_columns(whole: FeatureStats, num_tokens: int, num_contexts: int) -> dict[str, np.ndarray]:
    """Columns of `features.parquet`: all but ranks, labels and norms."""
    num_features = len(whole.count)
    columns: dict[str, np.ndarray] = {
        "count": whole.count,
        "tokens_counted": np.full(num_features, num_tokens, np.int64),
        "frequency": whole.count / max(num_tokens, 1),
        "context_count": whole.context_count,
        "context_frequency": whole.context_count / max(num_contexts, 1),
        "mean": statistics.mean(whole, num_tokens),
        "mean_when_firing": statistics.mean(whole, whole.count),
        "std": statistics.deviation(whole, num_tokens),
        "max": whole.maximum.astype(np.float64),
        "dead": whole.count == 0,
    }
    return columns | {name: statistics.quantile(whole, q) for name, q in QUANTILES}


def slice_arrays(by_slice: Mapping[str, FeatureStats], documents: Mapping[str, DocumentStats]) -> dict[str, np.ndarray]:
    """What is exact of every slice, slices in the order of their names on the second axis; no histograms."""
    parts = [by_slice[name].arrays() | documents[name].arrays() for name in sorted(by_slice)]
    names = [name for name in parts[0] if name != "histogram"]
    return {f"slice_{name}": np.stack([part[name] for part in parts], axis=1) for name in names}


def slice_rows(site: SiteKey, start: int, by_slice: Mapping[str, FeatureStats], counted: Mapping[str, int]) -> bytes:
    """Rows of `slices.parquet`, by feature, then slice name, as an IPC stream."""
    names = sorted(by_slice)
    num_features = len(next(iter(by_slice.values())).count)

    def column(of: Mapping[str, np.ndarray | Float64[np.ndarray, " F"]]) -> np.ndarray:
        return np.stack([of[name] for name in names], axis=1).reshape(-1)

    tokens = np.tile([counted[name] for name in names], num_features)
    count = column({name: s.count for name, s in by_slice.items()})
    rows = {
        "hook_point": [str(site.hook_point)] * len(count),
        "sae": [site.sae] * len(count),
        "feature_id": np.repeat(np.arange(start, start + num_features), len(names)),
        "slice": names * num_features,
        "count": count,
        "tokens_counted": tokens,
        "frequency": count / np.maximum(tokens, 1),
        "sum": column({name: statistics.mean(s, 1) for name, s in by_slice.items()}),
        "mean_when_firing": column({name: statistics.mean(s, s.count) for name, s in by_slice.items()}),
        "max": column({name: s.maximum.astype(np.float64) for name, s in by_slice.items()}),
    }
    return tables.ipc_bytes(tables.table(schemas.SLICES, rows))
