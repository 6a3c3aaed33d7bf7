"""Which features of a catalog a job means: ids of one SAE, or the best ranked of those that fit."""

from collections import Counter

from sae_census.config import AblateConfig, TraceConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.reader import Catalog


def chosen_features(config: TraceConfig | AblateConfig, catalog: Catalog) -> list[tuple[str, str, int]]:
    """The keys that `hook_point`, `sae`, `features` and `best` of a config mean.

    Raises:
        ConfigError: if no SAE fits, or ids are given and several do, or an SAE has no such feature.
    """
    keys = zip(catalog.features["hook_point"].to_pylist(), catalog.features["sae"].to_pylist(), strict=True)
    num_features = Counter(keys)
    chosen = [
        (hook_point, sae)
        for hook_point, sae in num_features
        if config.hook_point in (None, hook_point) and config.sae in (None, sae)
    ]
    known = ", ".join(f"{sae} at {hook_point}" for hook_point, sae in num_features)
    if not chosen:
        asked = {"hook_point": config.hook_point, "sae": config.sae}
        what = ", ".join(f"{key}={value}" for key, value in asked.items() if value is not None)
        raise ConfigError(f"{what} fits no SAE of catalog {config.catalog.name!r}; it has {known}")
    if not config.features:
        best = [catalog.best(config.best, *site).to_pylist() for site in chosen]
        return [(row["hook_point"], row["sae"], row["feature_id"]) for rows in best for row in rows]
    if len(chosen) > 1:
        raise ConfigError(f"features names ids of one SAE, but the catalog has {known}; choose with sae and hook_point")
    ((hook_point, sae),) = chosen
    if max(config.features) >= num_features[hook_point, sae]:
        raise ConfigError(
            f"features names {max(config.features)}, but {sae} has features 0 to {num_features[hook_point, sae] - 1}"
        )
    return [(hook_point, sae, feature_id) for feature_id in config.features]
