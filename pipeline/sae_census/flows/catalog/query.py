"""One question to a catalog, answered in rows."""

from collections.abc import Callable
from typing import Any

from sae_census.config.query import QueryConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.types import SiteKey

Rows = list[dict[str, Any]]


def query(config: QueryConfig) -> Rows:
    """The rows that answer.

    Raises:
        ConfigError: if the question lacks something, or asks for what is not there.
    """
    catalog = Catalog(config.store.root, config.catalog.name, config.snapshot)
    of_feature: dict[str, Callable[[str, str, int], Rows]] = {
        "feature": lambda point, sae, feature: [catalog.feature(point, sae, feature)],
        "spans": lambda point, sae, feature: catalog.spans(point, sae, feature).slice(0, config.limit).to_pylist(),
        "codes": lambda point, sae, feature: list(catalog.codes(point, sae, feature)),
        "nearest": lambda point, sae, feature: catalog.nearest(point, sae, feature, config.limit),
        "coactive": lambda point, sae, feature: catalog.coactive(point, sae, feature, config.limit),
    }
    of_text: dict[str, Callable[[str], Rows]] = {
        "search": lambda text: catalog.search(text, config.limit),
        "firing_on": lambda text: catalog.firing_on(text, config.limit),
        "slice": lambda text: catalog.in_slice(text, config.limit, config.by).to_pylist(),
    }
    if config.ask in of_text:
        if config.text is None:
            raise ConfigError(f"ask={config.ask} needs text=…")
        return _with_units(catalog, of_text[config.ask](config.text))
    if config.ask == "best":
        return _with_units(catalog, catalog.page(0, config.limit, config.hook_point, config.sae))
    if config.feature is None:
        raise ConfigError(f"ask={config.ask} needs feature=…, a feature id")
    point, sae = _site(catalog, config)
    try:
        catalog.feature(point, sae, config.feature)
    except KeyError as error:
        raise ConfigError(f"there is no feature {config.feature} of {sae} at {point}") from error
    return of_feature[config.ask](point, sae, config.feature)


def _with_units(catalog: Catalog, rows: Rows) -> Rows:
    """The rows, with what codes are measured in where that differs between their SAEs, whose numbers share no scale.

    A catalog that was made before it was noted has none to tell.
    """
    found = [catalog.units.get(f"{row.get('hook_point')}/{row.get('sae')}") for row in rows]
    if len(set(found)) < 2:
        return rows
    return [row | {"unit": unit} for row, unit in zip(rows, found, strict=True)]


def _site(catalog: Catalog, config: QueryConfig) -> tuple[str, str]:
    """The one SAE that is meant."""
    parsed = (SiteKey.parse(site) for site in catalog.saes)
    sites = [(str(site.hook_point), site.sae) for site in parsed]
    fits = [s for s in sites if config.hook_point in (None, s[0]) and config.sae in (None, s[1])]
    if len(fits) != 1:
        raise ConfigError(
            f"{len(fits)} SAEs fit hook_point={config.hook_point} sae={config.sae}; expected one of "
            f"{', '.join(f'hook_point={point} sae={sae}' for point, sae in sites)}"
        )
    return fits[0]
