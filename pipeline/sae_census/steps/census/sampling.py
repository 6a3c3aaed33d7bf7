"""How many samples of a feature a partial keeps, and what of a shard enters the hashes that draw them."""

from sae_census.compute.numbers.samples import SampleSizes
from sae_census.config import SamplingConfig

LOW_OCTAVES = 2
"""`low_activating` draws from codes at least this many octaves below the maximum's."""


def shard_key(shard_id: str) -> int:
    """The 64 bits of a shard's id that enter keyed hashes."""
    return int(shard_id[:16], 16)


def sample_sizes(sampling: SamplingConfig, partial_format: int) -> SampleSizes:
    """The sizes that a partial keeps: bands enough, and enough of each, to draw `low_activating` exactly.

    Args:
        sampling: of the config.
        partial_format: partials of format 3 keep no silent contexts of single features.
    """
    low = sampling.low_activating
    return SampleSizes(
        top=sampling.top,
        random=sampling.random,
        bands=max(sampling.bands, LOW_OCTAVES if low else 0),
        per_band=max(sampling.per_band, low),
        silent=sampling.silent,
        non_activating=sampling.non_activating if partial_format > 3 else 0,
    )
