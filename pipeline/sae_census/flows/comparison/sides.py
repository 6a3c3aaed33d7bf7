"""The two sides of a comparison: some slices of a catalog each, their sums, and whether they can be compared."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from sae_census.compute.comparison import Tokens
from sae_census.compute.numbers import fixed
from sae_census.config import SideConfig
from sae_census.errors import ConfigError, IdentityError
from sae_census.flows.catalog.reader import Catalog
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census import claims
from sae_census.steps.comparison.contrast import SiteSums, site_sums
from sae_census.steps.comparison.pairs import Measured
from sae_census.types import SiteKey

Kind = Literal["slices", "corpora", "drift"]
_INDIFFERENT = ("measure.sampling.", "measure.batch_contexts", "measure.codes", "measure.numerics",
                "preparation.shard_tokens")  # fmt: skip
"""Fields that change samples, last bits or where documents are cut, and no expectation."""
_OF_THE_MODEL = ("measure.model.digest", "measure.model.dtype", "measure.model.family")
_SAES = "measure.saes."
_INTEGERS = ("count", "document_count", "document_count_square", "document_count_tokens")
_LIMBS = ("total", "total_square", "document_total_square", "document_total_tokens")


class Side:
    """Some slices of a catalog."""

    def __init__(self, config: SideConfig):
        """Open the catalog.

        Raises:
            ConfigError: if it, or a slice, is not there, or if it weighs the chosen slices.
            IdentityError: if it was made from partials of another format.
        """
        self.catalog = Catalog(config.root, config.name, config.snapshot)
        self.name = config.name
        self._all = sorted(self.catalog.manifest.coverage.slices)
        if missing := sorted(set(config.slices) - set(self._all)):
            raise ConfigError(
                f"catalog {config.name!r} has no slice {', '.join(map(repr, missing))}; it has {', '.join(self._all)}"
            )
        self.slices = sorted(set(config.slices or self._all))
        if len(self.slices) > 1 and self.catalog.manifest.weights:
            raise ConfigError(
                f"catalog {config.name!r} weighs its slices, and tests count documents as they are; name one slice, or "
                "compare the catalog that it was built from"
            )
        self.identity = self.catalog.manifest.identity
        self._blobs = LocalBlobs(config.root)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its catalog."""
        return self.slices == self._all

    @property
    def saes(self) -> dict[str, str]:
        """Digests of the SAEs by site."""
        return self.catalog.measure.saes

    def measured(self, site: SiteKey) -> Measured:
        """Where the partials of one SAE lie."""
        return Measured(blobs=self._blobs, measure_id=self.catalog.measure.of(str(site)).measure_id)

    @property
    def shard_ids(self) -> list[str]:
        """Its shards, sorted."""
        return sorted(s.shard_id for s in self.catalog.manifest.shards if s.slice in self.slices)

    def sums(self, site: SiteKey) -> SiteSums:
        """Sums over its documents, all features of one SAE.

        Raises:
            ConfigError: if no token of it counts.
        """
        arrays = self.catalog.statistics(str(site.hook_point), site.sae)
        chosen = [self._all.index(name) for name in self.slices]

        def total(name: str) -> np.ndarray:
            parts: Iterable[np.ndarray] = (arrays[f"slice_{name}"][..., i] for i in chosen)
            return np.asarray(sum(parts))

        tokens = Tokens(
            documents=int(total("documents")), tokens=int(total("tokens")), square=float(total("tokens_square"))
        )
        if not tokens.tokens:
            raise ConfigError(f"{', '.join(self.slices)} of catalog {self.name!r} has no counted token at {site}")
        summed = {name: total(name) for name in _INTEGERS}
        for name in _LIMBS:
            summed[name] = reduce(fixed.add, (arrays[f"slice_{name}"][:, i] for i in chosen))
        return site_sums(tokens, summed, arrays["histogram"] if self.is_whole else None)

    def scores(self, site: SiteKey) -> Float64[np.ndarray, " F"]:
        """The catalog's score of every feature of one SAE."""
        rows = self.catalog.best(1 << 31, str(site.hook_point), site.sae).sort_by("feature_id")
        return np.asarray(rows["score"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """What two comparable sides have to do with each other."""

    kind: Kind
    """slices: of one catalog; corpora: other text under the same model; drift: the same text under other models."""
    sites: tuple[SiteKey, ...]
    """SAEs that both have."""
    left_out: tuple[str, ...]
    """Sites that only one has."""
    indifferent: dict[str, tuple[Any, Any]]
    """Fields that differ and do not matter, with their values."""


def relate(a: Side, b: Side) -> Relation:
    """Prove that a difference between two sides would mean something.

    Raises:
        ConfigError: if they share text, or no SAE.
        IdentityError: if they differ in a field that decides numbers, naming every such field.
    """
    found = claims.differences(a.identity, b.identity)
    common = sorted(a.saes.keys() & b.saes.keys())
    left_out = sorted(a.saes.keys() ^ b.saes.keys())
    of_the_model = [field for field in found if field in _OF_THE_MODEL]
    indifferent = {field: values for field, values in found.items() if field.startswith(_INDIFFERENT)}
    known = {*of_the_model, *indifferent, *(_SAES + site for site in left_out)}
    if wrong := {field: values for field, values in found.items() if field not in known}:
        what = "; ".join(f"{field} is {one!r} in a and {other!r} in b" for field, (one, other) in wrong.items())
        raise IdentityError(f"a and b cannot be compared: {what}; make both under the same settings")
    if not common:
        raise ConfigError(f"a and b have no SAE in common: a has {', '.join(a.saes)}; b has {', '.join(b.saes)}")
    shared, num_a, num_b = len({*a.shard_ids} & {*b.shard_ids}), len(a.shard_ids), len(b.shard_ids)
    if of_the_model and not shared == num_a == num_b:
        raise IdentityError(
            f"the models of a and b differ ({', '.join(of_the_model)}) and so does their text ({num_a} and {num_b} "
            f"shards, {shared} in common): what is one model's doing could not be told; choose the same slices, made "
            "from the same sources with the same corpus.shard_tokens"
        )
    if not of_the_model and shared:
        raise ConfigError(
            f"a and b are the same model on the same text: {shared} of {num_a} and {num_b} shards are in both; choose "
            f"other slices, as a.slices=[…] b.slices=[…] (a has {', '.join(a.slices)}; b has {', '.join(b.slices)})"
        )
    kind: Kind = "slices" if a.catalog.digest == b.catalog.digest else "corpora"
    return Relation(
        kind="drift" if of_the_model else kind,
        sites=tuple(map(SiteKey.parse, common)),
        left_out=tuple(left_out),
        indifferent=indifferent,
    )
