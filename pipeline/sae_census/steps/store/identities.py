"""What decides numbers, as the store says it: preparations, measures, and the identities of catalogs.

A record gives back what it was read from, field by field: one that an older program wrote lacks fields that came later,
and keeps its digest. Defaults say what the absence of a field means to a reader.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sae_census.config import MasksConfig
from sae_census.errors import IdentityError
from sae_census.records import AsGiven, Record, digest_of

PREPARATION_FORMAT = 2
"""Raise it when shards are cut or written in another way. 1 put a BOS before text that brought its own, too."""
MEASURE_FORMAT = 4
"""Raise it when the arrays of a partial change, or what a measure says."""
_READABLE = (3, MEASURE_FORMAT)
"""Formats of partials that can be read beside each other; `claims` says what is different about the older ones."""
MIXED: Literal["mixed"] = "mixed"
"""The numerics of a measure whose shards may come from machines that compute other bits."""

Numerics = dict[str, str | int | None]
"""Settings of a machine that decide last bits, as `io.device.configure` gives them."""


class Preparation(AsGiven, Record):
    """Everything that decides which tokens stand in which context."""

    format: int
    """Of shards, as `PREPARATION_FORMAT` counts them."""
    tokenizer: str
    """Digest of its rules; in format 1 of its files."""
    context_length: int
    """Tokens."""
    packing: str
    """As `corpus.packing`."""
    long_documents: str | None
    """As `corpus.long_documents`, where that matters."""
    bos: bool
    """Whether contexts or documents begin with a BOS."""
    shard_tokens: int
    """Tokens after which a shard ends."""

    @property
    def preparation_id(self) -> str:
        """Names the folder of shards."""
        return digest_of(self.content())


class MeasuredModel(AsGiven):
    """The model that something was computed with."""

    digest: str
    """Of its files."""
    family: str
    """As `transformers` calls it."""
    dtype: str
    """It computed in, as torch calls it."""
    tokenizer: str
    """Digest of the tokenizer's rules; in measures of format 3 of its files."""


class MeasuredSae(AsGiven):
    """The SAE of a measure, whatever it is called."""

    hook_point: str
    digest: str
    """Of its weights and settings."""


class _Settings(AsGiven):
    """What the measures of a catalog share."""

    format: int
    """Of partials, as `MEASURE_FORMAT` counts them."""
    model: MeasuredModel
    context_length: int
    """Tokens."""
    masks: MasksConfig
    """Which tokens were counted, as it was said then; `claims.masks_of` says what absent rules meant."""
    sampling: dict[str, int]
    """Sizes of samples by their names in `SampleSizes`, and the seed."""
    batch_contexts: int
    """Contexts of one forward pass."""
    codes: str
    """Whether all codes were kept: keep or drop."""
    numerics: Literal["mixed"] | Numerics
    """Of the machines."""


class Measure(_Settings):
    """Everything but the text that decides the bytes of the partials of one SAE.

    It knows of no other SAE and of no name, so whoever looks at the same SAE in the same way shares partials.
    """

    sae: MeasuredSae

    @property
    def measure_id(self) -> str:
        """Names the folder of partials."""
        return digest_of(self.content())


class Measures(_Settings):
    """The measures of all SAEs of a catalog."""

    saes: dict[str, str]
    """Digests by site."""

    def of(self, site: str) -> Measure:
        """The measure of one SAE."""
        shared = {name: value for name, value in self.content().items() if name != "saes"}
        sae = {"hook_point": site.rsplit("/", 1)[0], "digest": self.saes[site]}
        return Measure.model_validate(shared | {"sae": sae})

    @property
    def ids(self) -> dict[str, str]:
        """The id of every SAE's measure, by site."""
        return {site: self.of(site).measure_id for site in self.saes}


class MeasureRecord(AsGiven, Record):
    """What a folder of partials is, for whoever finds it."""

    fields: Measure
    preparation_id: str
    """Of shards that were measured so."""
    config: dict[str, Any]
    """Of a job that asked for it, as it was then."""


class Identity(AsGiven, Record):
    """All that decides a catalog's numbers but the text."""

    preparation: Preparation
    measure: Measures


def check_formats(content: Mapping[str, Any], what: str) -> None:
    """Prove that an identity is of formats that this program knows, before its fields are looked at.

    Args:
        content: of an identity, as JSON has it.
        what: it belongs to, as a message names it.

    Raises:
        IdentityError: if a format is newer than this program, or of partials that are too old.
    """
    for part, known in (("measure", MEASURE_FORMAT), ("preparation", PREPARATION_FORMAT)):
        found = content.get(part)
        made = found.get("format") if isinstance(found, dict) else None
        if isinstance(made, int) and made > known:
            raise IdentityError(
                f"{what} was made by a newer SAE Census ({part} format {made}, this one knows {known}); "
                "use that, or choose another catalog.name"
            )
        if part == "measure" and isinstance(made, int) and made not in _READABLE:
            raise IdentityError(
                f"{what} was made from partials of format {made}, expected {' or '.join(map(str, _READABLE))}; "
                "run sae-census analyze again under another catalog.name"
            )
