"""What a discovery request asks for, among the model and SAEs that are loaded."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_census.config import DiscoverRequest, MasksConfig
from sae_census.errors import RequestError
from sae_census.steps.discovery.background import Backgrounds
from sae_census.steps.model.reader import Reader
from sae_census.types import STREAMS, SiteKey, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a discoverer answers with."""

    reader: Reader
    model_id: str
    model_digest: str
    dtype: str
    identity: dict[str, Any]
    """All that decides activations beside the tokens."""
    sae_ids: dict[str, list[SiteKey]]
    """What a request may call SAEs, and which these are."""
    max_tokens: int
    backgrounds: Backgrounds | None = None
    labels: Mapping[SiteKey, Mapping[int, str]] = field(default_factory=dict)

    def masks(self, request: DiscoverRequest) -> MasksConfig:
        """Which tokens a request can keep: special ones never, for the rest it goes before the catalog."""
        base = MasksConfig(attention_sinks=True) if self.backgrounds is None else self.backgrounds.masks
        names = ("first_positions", "max_norm_ratio", "attention_sinks")
        chosen = {name: getattr(request, name) for name in names}
        return base.model_copy(update={"special_tokens": True} | {k: v for k, v in chosen.items() if v is not None})


def sites_of(request: DiscoverRequest, loaded: Loaded) -> list[SiteKey]:
    """The SAEs that a request asks for, by layer, stream and name.

    Raises:
        RequestError: if something is asked for that is not there.
    """
    if request.model_id not in (None, loaded.model_id):
        raise RequestError(
            f"model {request.model_id} is not loaded here; there is {loaded.model_id}", "model_id", unknown=True
        )
    everything = list(loaded.reader.saes)
    if request.sae_id is not None and request.sae_id not in loaded.sae_ids:
        raise RequestError(
            f"SAE {request.sae_id} is not loaded here; there are {', '.join(loaded.sae_ids)}",
            "sae_id",
            unknown=True,
        )
    mine = everything if request.sae_id is None else loaded.sae_ids[request.sae_id]
    chosen = [
        site
        for site in mine
        if (request.layers is None or site.hook_point.layer in request.layers)
        and (request.streams is None or site.hook_point.stream in request.streams)
    ]
    have = {(site.hook_point.layer, site.hook_point.stream) for site in chosen}
    layers = request.layers or sorted({layer for layer, _ in have})
    there = ", ".join(sorted({f"layer {s.hook_point.layer} {s.hook_point.stream}" for s in mine}))
    wanted: list[Stream | None] = [*request.streams] if request.streams else [None]
    for layer, stream in itertools.product(layers, wanted):
        if not any(a == layer and stream in (None, b) for a, b in have):
            where = f"layer {layer}{f' {stream}' if stream else ''}"
            raise RequestError(f"there is no SAE for {where}; there are SAEs for {there}", "layers")
    if not chosen:
        raise RequestError(f"there is no SAE for these streams; there are SAEs for {there}", "streams")
    widest = max(loaded.reader.saes[site].num_features for site in chosen)
    if beyond := [f for f in request.restrict_features if f >= widest]:
        raise RequestError(
            f"feature {beyond[0]} does not exist; the SAEs have features 0 to {widest - 1}", "restrict_features"
        )
    if request.normalize == "mean_code" and loaded.backgrounds is None:
        raise RequestError("mean_code needs a catalog, and none is loaded", "normalize")
    return sorted(chosen, key=place)


def place(site: SiteKey) -> tuple[int, int, str]:
    """Sorts sites: by layer, stream, name."""
    return site.hook_point.layer, STREAMS.index(site.hook_point.stream), site.sae
