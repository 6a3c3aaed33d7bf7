"""Everything that decides numbers, read and checked before any work."""

from collections.abc import Iterable
from dataclasses import dataclass

from sae_census.config import AnalyzeConfig
from sae_census.errors import ConfigError
from sae_census.io import embedded
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.loading.versions import versions
from sae_census.io.model import device
from sae_census.io.model.device import choose_device, choose_dtype
from sae_census.io.model.hooks import check_point
from sae_census.io.model.language_model import ModelFacts
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.text.corpus import Found, find_sources
from sae_census.records import Receipt, canonical
from sae_census.steps.census import claims, plan
from sae_census.steps.census.logits import check_request
from sae_census.steps.census.prepare import preparation_of, read_settings
from sae_census.steps.model.parts import facts_of, tokenizer_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store import layout
from sae_census.steps.store.identities import MIXED, Identity, MeasuredModel, Numerics
from sae_census.types import SiteKey, twins, wrong_with_name

_CHARS_PER_TOKEN = 3.6
"""Of the embedded texts, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """Everything that decides numbers, known before any work."""

    config: AnalyzeConfig
    """The job's, every null key of a mask settled."""
    facts: ModelFacts
    saes: dict[SiteKey, LoadedSae]
    numerics: Numerics
    versions: dict[str, str]
    """Of the software here; no part of an identity."""
    identity: Identity
    """What the catalog's name stands for."""
    special_ids: tuple[int, ...]
    """Of the tokenizer."""

    @property
    def preparation_id(self) -> str:
        """Names the folder of shards."""
        return self.identity.preparation.preparation_id

    @property
    def measure_ids(self) -> dict[SiteKey, str]:
        """Name the folders of partials."""
        by_name = self.identity.measure.ids
        return {site: by_name[str(site)] for site in self.saes}

    @property
    def provenance(self) -> Provenance:
        """What workers have to load."""
        return Provenance.of_measures(self.identity.measure)

    def numerics_of(self, receipts: Iterable[Receipt]) -> Numerics | dict[str, list[Numerics]]:
        """What the shards of a snapshot were computed with: one answer, or `mixed`: all there are."""
        if self.identity.measure.numerics != MIXED:
            return self.numerics
        ran = ({k: v for k, v in receipt.ran["numerics"].items() if k != "torch"} for receipt in receipts)
        found = {canonical(numerics): numerics for numerics in ran}
        return {str(MIXED): [found[key] for key in sorted(found)]}


def settled(config: AnalyzeConfig) -> AnalyzeConfig:
    """The config with every mask decided: as the catalog's name was made, else by today's default.

    Raises:
        CorruptError: if what the name stands for cannot be read.
    """
    claim = claims.claimed(LocalBlobs(config.store.root), config.catalog.name)
    return config.model_copy(update={"masks": claims.resolved(config.masks, claim)})


def identify(config: AnalyzeConfig) -> Identified:
    """Read model config, SAEs and tokenizer; check what can be checked without the model's weights.

    Identities have the form that the catalog's name was claimed in.

    Raises:
        UserError: if they do not belong together, or cannot be read.
    """
    claim = claims.claimed(LocalBlobs(config.store.root), config.catalog.name)
    if claim is None:
        _check_names(config)
    config = config.model_copy(update={"masks": claims.resolved(config.masks, claim)})
    model = config.model
    chosen = choose_device(model.device)
    if config.cluster.mixed_numerics and model.dtype == "auto":
        raise ConfigError(
            "cluster.mixed_numerics is true and model.dtype auto, which machines of several kinds may understand in "
            "several ways; choose one, as model.dtype=float32"
        )
    facts = facts_of(model)
    saes = load_saes(config.saes)
    if claim is None:
        _check_site_names(saes)
    for key, loaded in saes.items():
        check_point(key.hook_point, facts.taps, facts.num_layers)
        if key.hook_point.stream.startswith("resid") and loaded.sae.width != facts.d_model:
            raise ConfigError(
                f"SAE {key.sae} is {loaded.sae.width} wide, but {key.hook_point} of {model.id} is {facts.d_model} "
                "wide; is this the SAE of another model?"
            )
    if facts.max_positions and config.corpus.context_length > facts.max_positions:
        raise ConfigError(
            f"corpus.context_length is {config.corpus.context_length}, but the model has only "
            f"{facts.max_positions} positions; choose a shorter one"
        )
    tokenizer = tokenizer_of(model)
    if config.corpus.bos == "always" and tokenizer.bos_id is None:
        raise ConfigError(f"corpus.bos is always, but the tokenizer of {model.id} has no BOS token; use never")
    check_request(config.logits, (key.hook_point for key in saes), tokenizer)
    shard_tokens = config.corpus.shard_tokens or plan.default_shard_tokens(chosen, facts.num_layers, facts.d_model)
    numerics = device.configure(config.cluster.threads_per_worker, chosen)
    dtype = str(choose_dtype(model.dtype, chosen)).removeprefix("torch.")
    about = MeasuredModel(digest=facts.digest, family=facts.family, dtype=dtype, tokenizer=tokenizer.digest)
    today = Identity(
        preparation=preparation_of(config.corpus, tokenizer, shard_tokens),
        measure=plan.measures_of(config, about, saes, numerics),
    )
    return Identified(
        config=config,
        facts=facts,
        saes=saes,
        numerics=dict(numerics),
        versions=versions(chosen),
        special_ids=tuple(tokenizer.special_ids),
        identity=claims.expressed(today, claim, tokenizer),
    )


def _check_names(config: AnalyzeConfig) -> None:
    """Names of a new catalog, before any work; those of a catalog that is there already stay what they are."""
    name, source = config.catalog.name, config.corpus.source
    slices = list(source) if isinstance(source, dict) else []
    given = [("saes[].name", one.name) for one in config.saes if one.name is not None]
    for key, value in (*given, *(("a slice of corpus.source", one) for one in slices)):
        if reason := wrong_with_name(value):
            raise ConfigError(f"{key} is {value!r:.80}: {reason}")
    if same := twins(slices):
        raise ConfigError(f"slices {same[0]!r} and {same[1]!r} differ by case only; give one another name")
    folder = LocalBlobs(config.store.root).path(layout.catalogs())
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if same := twins([*(one for one in there if one.casefold() == name.casefold()), name]):
        raise ConfigError(
            f"catalog.name is {name!r}, and {config.store.root} has a catalog {same[0]!r}, which differs by case only; "
            "choose another name"
        )


def _check_site_names(saes: Iterable[SiteKey]) -> None:
    """The names that SAEs have of their folders, as `_check_names`."""
    sites = list(saes)
    for site in sites:
        if reason := wrong_with_name(site.sae):
            raise ConfigError(
                f"the SAE at {site.hook_point} would be called {site.sae!r:.80}, as its folder is: {reason}; give it a "
                "saes[].name"
            )
    for point in {site.hook_point for site in sites}:
        if same := twins(site.sae for site in sites if site.hook_point == point):
            raise ConfigError(
                f"two SAEs at {point} are called {same[0]!r} and {same[1]!r}, which differ by case only; give one "
                "another saes[].name"
            )


def find_config_sources(config: AnalyzeConfig) -> Found:
    """The sources that a config names.

    Raises:
        SourceError: if one is not there.
    """
    source = config.corpus.source
    if source == embedded.PREFIX + "texts":
        source = {name: embedded.PREFIX + name for name in embedded.SLICES}
    num_embedded = str(source).count(embedded.PREFIX)
    return find_sources(
        source,
        read_settings(config.corpus),
        group_files=config.corpus.group_files,
        embedded_chars=int(config.corpus.embedded_tokens * _CHARS_PER_TOKEN / max(num_embedded, 1)),
    )
