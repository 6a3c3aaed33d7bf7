"""The manifest of a snapshot: what it was made of, what its files are, and the digest that stands for all of it.

`Facts` belong to the content: equal catalogs have equal ones. `Making` does not: times, machines, settings of the job.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from sae_census.errors import CorruptError
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import AsGiven, Record, ShardRecord, canonical, unsealed
from sae_census.steps.store.identities import Identity, MeasuredModel, Numerics, check_formats


class PublishedFile(AsGiven):
    """A file of a snapshot."""

    sha256: str
    num_bytes: int


class SliceCoverage(AsGiven):
    """How much of a slice is in a snapshot."""

    shards: int
    contexts: int
    tokens: int
    """All, counted or not."""


class SourceCoverage(AsGiven):
    """What a snapshot has of one source."""

    source_id: str
    slice: str
    names: tuple[str, ...]
    """Of its files, or of the dataset."""
    shards: tuple[str, ...]
    """Ids; some may be missing in the snapshot."""
    records_dropped: dict[str, int]
    """By reason."""
    tokens_truncated: int
    documents_with_bos: int = 0
    """Whose text brought a BOS of its own."""
    unused_files: tuple[str, ...] = ()
    """In which no record could be used."""


class Coverage(AsGiven):
    """Which text a snapshot is of."""

    complete: bool
    """Whether no shard is missing."""
    missing: tuple[str, ...]
    """Ids of shards that could not be analysed."""
    shards: int
    slices: dict[str, SliceCoverage]
    tokens: dict[str, dict[str, int]]
    """By hook point: how many tokens count, and how many each rule excluded."""
    records_dropped: dict[str, int]
    """By reason."""
    tokens_truncated: int
    documents_with_bos: int = 0
    """Whose text brought a BOS of its own."""
    sources: tuple[SourceCoverage, ...]


class Ranking(AsGiven):
    """How features were ordered."""

    score: str
    """As `compute.numbers.scores` names it."""


class LogitFacts(AsGiven):
    """What the logits of a snapshot mean."""

    top_k: int
    """Tokens of either sign that each feature has."""
    mode: str
    """As `logits.mode`."""
    definition: str
    """The same in words."""
    num_tokens: int
    """Tokens of the vocabulary that were compared."""
    num_padding: int
    """Rows of the unembedding that are no token's, and were not."""


class Facts(AsGiven):
    """What of a manifest belongs to the content of its snapshot."""

    identity: Identity
    preparation_id: str
    """Names the folder of the shards."""
    measures: dict[str, str]
    """Ids by site; they name the folders of the partials."""
    ranking: Ranking
    span_groups: tuple[str, ...]
    """In the order in which they are listed."""
    shards: tuple[ShardRecord, ...]
    """Sorted by id."""
    coverage: Coverage
    fraction_of_variance_unexplained: dict[str, float | None]
    """By site; None where nothing is known."""
    weights: dict[str, int] = Field(default_factory=dict)
    """Copies of each slice that the statistics of the whole count; empty if one of each."""
    logits: LogitFacts | None = None
    """None if there are no tables of logits."""


class Job(AsGiven):
    """What a job says of itself in the manifest of the snapshot that it makes."""

    config: dict[str, Any]
    """Of the job, as it was then: an older one lacks keys."""
    numerics: Numerics | dict[str, list[Numerics]]
    """Of the machine that computed the shards; under `mixed`, of all there were."""
    seconds: dict[str, float]
    """By stage."""
    built_from: dict[str, Any] | None = None
    """The config of `sae-census catalog action=build`, if that made it."""
    passed_over: tuple[dict[str, str | int], ...] = ()
    """Files that `corpus.source` came upon and did not read, as `io.text.folders.PassedOver`."""
    units: dict[str, str] = Field(default_factory=dict)
    """What the codes of each SAE are measured in, by site; empty before it was noted."""


class Making(Job):
    """What of a manifest says how, when and with what its snapshot was made."""

    made_at: float
    """Unix time."""
    made_with: dict[str, str] = Field(default_factory=dict)
    """Versions of the software that published it."""
    versions: tuple[dict[str, str | int], ...] = ()
    """Every set of versions that computed shards of it, and how many, under `shards`."""
    unproven: dict[str, int] = Field(default_factory=dict)
    """How many records without a seal it was made from, by kind."""


class Manifest(Facts, Making, Record):
    """All that a snapshot says of itself."""

    catalog: str
    snapshot: int
    digest: str
    """Equal for equal content."""
    files: dict[str, PublishedFile]
    """By path in the folder of the snapshot."""

    @classmethod
    def of(cls, name: str, number: int, files: Mapping[str, PublishedFile], facts: Facts, making: Making) -> Self:
        """The manifest of a snapshot that is about to be published.

        Args:
            name: of the catalog.
            number: of the snapshot.
            files: of the snapshot.
            facts: that belong to its content.
            making: that do not.
        """
        digest = content_digest(files, facts)
        own = {"catalog": name, "snapshot": number, "digest": digest, "files": dict(files)}
        return cls.model_validate({**facts.content(), **making.content(), **own})

    def counted(self) -> Self:
        """The same; one that was read without a seal says so among what it was made from."""
        if self.is_proven:
            return self
        return self.model_copy(update={"unproven": {**self.unproven, "manifests": 1}})

    @property
    def facts(self) -> Facts:
        """What belongs to the content."""
        return Facts.model_validate(self.model_dump(mode="json", include=set(Facts.model_fields), exclude_unset=True))

    @property
    def making(self) -> Making:
        """What does not."""
        return Making.model_validate(self.model_dump(mode="json", include=set(Making.model_fields), exclude_unset=True))


class AttributionRecord(AsGiven, Record):
    """What a folder of logits says of itself, which belongs to no catalog."""

    files: dict[str, PublishedFile]
    model: MeasuredModel
    saes: dict[str, str]
    """Digests by site."""
    logits: LogitFacts


def content_digest(files: Mapping[str, PublishedFile], facts: Facts) -> str:
    """The digest of a snapshot."""
    listed = {name: file.content() for name, file in files.items()}
    return hashlib.sha256(canonical({"files": listed, **facts.content()})).hexdigest()


def open_manifest(folder: Path) -> Manifest:
    """The manifest of a snapshot's folder.

    One without a seal proves what its digest stands for, and not its config, its times and its number.

    Raises:
        CorruptError: if it is no manifest, or not the one that was published.
        IdentityError: if it is of a form that is newer than this program, or of partials that are too old.
    """
    path = folder / "manifest.json"
    advice = f"run sae-census analyze as for catalog {folder.parent.name!r} again, or remove {folder}"
    try:
        body = path.read_bytes()
        identity = unsealed(body, str(path))[0].get("identity")
        check_formats(identity if isinstance(identity, dict) else {}, f"catalog {folder.parent.name!r}")
        manifest = Manifest.read(body, str(path))
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing; {advice}") from error
    except CorruptError as error:
        raise CorruptError(f"{path} is damaged: it is not the manifest that was published; {advice}") from error
    if content_digest(manifest.files, manifest.facts) != manifest.digest:
        raise CorruptError(f"{path} is damaged: its content is not what its digest says; {advice}")
    if folder.name.isdigit() and manifest.snapshot != int(folder.name):
        raise CorruptError(f"{path} is the manifest of snapshot {manifest.snapshot}; {advice}")
    return manifest


def describe(blobs: LocalBlobs, key: str, record: Record) -> None:
    """Say in the store what a preparation or measure is, unless it says so already and the record is sound."""
    if not blobs.put_if_absent(key, record.to_bytes()):
        try:
            unsealed(blobs.get(key), key)
        except CorruptError:
            blobs.put(key, record.to_bytes())
