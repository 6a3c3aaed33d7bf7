"""Discovery: which features does a prompt or text use? One request, answered by a loaded model."""

from sae_census.config import DiscoverRequest, DiscoveryConfig
from sae_census.findings import Discovery
from sae_census.io import embedded
from sae_census.io.loading.versions import versions
from sae_census.io.model import device
from sae_census.io.model.device import choose_device, choose_dtype
from sae_census.io.store.memo import ArrayCache
from sae_census.steps.discovery.background import load_backgrounds, read_labels
from sae_census.steps.discovery.discoverer import Discoverer
from sae_census.steps.discovery.requests import Loaded
from sae_census.steps.model.parts import facts_of, tokenizer_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import Reader, load_saes
from sae_census.types import SiteKey


def open_discoverer(config: DiscoveryConfig, planned: Provenance | None = None) -> Discoverer:
    """Load model, SAEs and background.

    Args:
        config: names them.
        planned: what model, tokenizer and SAEs have to be; None: whatever lies there.

    Raises:
        UserError: if they cannot be read or do not belong together.
    """
    model = config.model
    chosen = choose_device(model.device)
    numerics = device.configure(config.threads, chosen)
    reader = Reader(model, config.saes, planned)
    reader.warn_of_centring()
    facts = reader.model.facts
    dtype = str(choose_dtype(model.dtype, chosen)).removeprefix("torch.")
    identity = {
        "model": facts.digest,
        "dtype": dtype,
        "tokenizer": reader.tokenizer.digest,
        "numerics": numerics,
        "versions": versions(chosen),
    }
    folder = embedded.cache_dir() / "discover"
    loaded = Loaded(
        reader=reader,
        model_id=config.model_name or model.id,
        model_digest=facts.digest,
        dtype=dtype,
        identity=identity,
        sae_ids=_sae_ids(config, list(reader.loaded)),
        max_tokens=min(config.max_tokens, facts.max_positions or config.max_tokens),
        backgrounds=None if config.catalog is None else load_backgrounds(config.catalog, reader.loaded),
        labels={} if config.labels is None else read_labels(config.labels, reader.loaded),
    )
    return Discoverer(loaded, ArrayCache(folder, config.cache_mb << 20) if config.cache_mb else None)


def _sae_ids(config: DiscoveryConfig, sites: list[SiteKey]) -> dict[str, list[SiteKey]]:
    ids: dict[str, list[SiteKey]] = {} if config.sae_id is None else {config.sae_id: sites}
    for site in sites:
        mine = ids.setdefault(site.sae, [])
        if site not in mine:
            mine.append(site)
    return ids


def discover(config: DiscoveryConfig, request: DiscoverRequest) -> Discovery:
    """Answer one request.

    Raises:
        UserError: if something is missing or wrong.
    """
    return open_discoverer(config).discover(request)


def plan_of(config: DiscoveryConfig) -> Provenance:
    """What lies now where a config names model, tokenizer and SAEs; they are hashed, and the model is not loaded."""
    return Provenance(
        model=facts_of(config.model).digest,
        tokenizer=tokenizer_of(config.model).digest,
        saes={str(site): loaded.digest for site, loaded in load_saes(config.saes).items()},
    )
