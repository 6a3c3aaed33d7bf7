"""The sections that jobs share: every key, its default and its meaning."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from sae_census.types import wrong_with_name

Source = str | tuple[str, ...]


def _named(name: str) -> str:
    if reason := wrong_with_name(name):
        raise ValueError(reason)
    return name


Name = Annotated[str, AfterValidator(_named)]
"""As `wrong_with_name` has it."""


class Section(BaseModel):
    """A frozen part of a config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """The language model."""

    id: str = "embedded:model"
    """A hub id, a local directory, a GGUF file, or the embedded model."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the hardware computes in it, else float32."""
    device: str = "auto"
    """auto: the GPU where there is one, else cpu."""
    trust_remote_code: bool = False
    """Run model code from the hub. Off unless you have read that code."""
    fix_mistral_regex: bool | None = None
    """Mistral tokenizers saved by transformers before 5.0 split words by a wrong rule, and transformers warns of it.
    true: mend it; false: keep the old ids, as for SAEs trained on them; null: keep them and be warned."""
    center_writing_weights: bool = False
    """Take the mean over d_model off all that writes to the residual stream, as TransformerLens does: for SAEs that
    were trained on such a model. Only where the norms are LayerNorms, so that predictions stay what they are."""


class SaeConfig(Section):
    """One sparse autoencoder."""

    path: str
    """A local directory or weights file, a hub id org/repo/folder[/file], or embedded:<name>."""
    hook_point: str | None = None
    """Overrides the checkpoint's own metadata, as blocks.15.hook_resid_post; chooses the file where a folder has
    one for each layer."""
    format: str | None = None
    """A known checkpoint format; detected if null."""
    name: str | None = None
    """Its name in the catalog: letters, digits, dots, dashes and underscores. Defaults to the last part of the path
    that is not a file."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    k: PositiveInt | None = None
    """Codes of a token, for a TopK checkpoint that does not say; where one does, both must agree."""
    normalize_activations: Literal["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"] | None = (
        None
    )
    """What the SAE expects to be done to activations, in SAELens' words, where its folder does not say it or says it
    wrongly: brought to length sqrt(D) or through a layer norm, token by token, or all times norm_scaling_factor."""
    norm_scaling_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The factor of expected_average_only_in, where no file says it: sqrt(D) / the average length of activations."""


class CorpusConfig(Section):
    """The text."""

    source: Source | dict[str, Source] = "embedded:texts"
    """Files (globs), a directory of files, a URL, or a dataset id or directory; one, many, or a mapping slice name ->
    source. Wildcards match no dot; docs/text.md says what is a dataset. embedded:texts stands for the slices docs,
    code and prose."""
    column: str = "text"
    """The field that holds the text."""
    split: str = "train"
    """Of a dataset; files have none."""
    revision: str | None = None
    """Of a dataset on the hub."""
    streaming: bool = False
    """Read a dataset without storing it first."""
    context_length: int = Field(default=128, ge=2, le=1 << 20)
    """Tokens of one context."""
    packing: Literal["concat", "document"] = "concat"
    """concat: documents joined, then cut; document: every context holds one document."""
    long_documents: Literal["chunk", "truncate"] = "chunk"
    """What document packing does with the rest of a document that exceeds its context."""
    bos: Literal["auto", "always", "never"] = "auto"
    """A BOS token before every document and every context, unless text brings it; auto: if the tokenizer adds one."""
    shard_tokens: PositiveInt | None = None
    """Size of a shard; null: a constant by device class and model size."""
    group_files: PositiveInt = 1
    """Join about this many small files into one source; a new file then changes the group it falls into."""
    txt_documents: Literal["file", "line"] = "file"
    """What one document of a .txt file is."""
    max_tokens: PositiveInt | None = None
    """Stop each slice after the shard that reaches this many tokens."""
    max_bad_records: int = Field(default=1000, ge=0)
    """More records than these that cannot be used end the run."""
    max_record_bytes: PositiveInt = 16 << 20
    """Larger records are bad."""
    embedded_tokens: PositiveInt = 200_000
    """About how much of the embedded texts to take."""


class MasksConfig(Section):
    """Tokens that the census passes over; each rule's exclusions are counted."""

    special_tokens: bool = True
    """BOS, EOS and the other special tokens of the tokenizer; a pad token that is an ordinary word counts."""
    first_positions: int = Field(default=0, ge=0)
    """This many positions at the start of every context."""
    positions: tuple[int, ...] = ()
    """These positions of every context."""
    max_norm_ratio: float | None = Field(default=None, gt=1)
    """Tokens whose activation norm exceeds this many times the median of their context."""
    attention_sinks: bool | None = None
    """Attention sinks: tokens with a norm of more than 10 times the median of their context, or of more than 2 times
    if one dimension holds over half of the energy. null: as the catalog's name was made, true for a new name (false
    for one that is older than this key)."""


class SamplingConfig(Section):
    """What is kept of every feature."""

    top: int = Field(default=20, ge=0)
    """Strongest contexts."""
    random: int = Field(default=10, ge=0)
    """Hash-random firings."""
    bands: int = Field(default=5, ge=0)
    """Octaves of magnitude, the maximum's first, that are sampled one by one."""
    per_band: int = Field(default=5, ge=0)
    """Hash-random firings of each band."""
    low_activating: int = Field(default=5, ge=0)
    """Hash-random firings at least two octaves below the maximum's."""
    non_activating: int = Field(default=5, ge=0)
    """Hash-random contexts with counted tokens in which the feature stays silent, where there are so many."""
    silent: int = Field(default=64, ge=0)
    """Hash-random contexts of the whole catalog from which those are drawn; a feature that is silent in too few of
    them draws from all contexts."""
    before: int = Field(default=24, ge=0)
    """Tokens of a span before its peak; a span never leaves its document."""
    after: int = Field(default=8, ge=0)
    """Tokens of a span after its peak."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Key of every hash."""


Score = Literal["frequency", "mean", "max", "mean_when_firing", "mean_x_coverage", "surprise"]


class RankingConfig(Section):
    """How features are ordered within their SAE."""

    score: Score = "mean_x_coverage"
    """As compute.numbers.scores defines them; surprise favours strong, rare and yet well-attested features."""


class LogitsConfig(Section):
    """Direct effects of features on the logits."""

    top_k: int = Field(default=0, ge=0)
    """Tokens that each feature promotes most, and as many that it suppresses most; 0: none are computed."""
    mode: Literal["direction", "ln_final"] = "direction"
    """As compute.numbers.logits defines them: the linear direct path, or the decoder row through the final norm."""


class BatchConfig(Section):
    """The fixed grid of forward passes."""

    contexts: PositiveInt = 32
    """Contexts of one forward pass; part of the measure, because it decides the last bits."""


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]


class WorkerClass(Section):
    """Workers of one kind, for a cluster whose nodes are of several kinds.

    All compute with cluster.threads_per_worker threads, because threads are a part of the measure.
    """

    workers: PositiveInt = 1
    """Actors of this class."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """null: 1 if the model runs on a GPU, else 0."""
    memory_gib: PositiveFloat | None = None
    """Memory that Ray sets aside on its node; null: none."""
    resources: dict[str, PositiveFloat] = {}
    """What else it takes of a node: custom resources of Ray, by name."""
    labels: dict[str, Label] = {}
    """Labels that its node must have, as `ray start --labels` or Ray itself gave them."""

    @model_validator(mode="before")
    @classmethod
    def _same_threads(cls, given: Any) -> Any:
        if isinstance(given, dict) and "threads_per_worker" in given:
            raise ValueError(
                "all classes compute with cluster.threads_per_worker threads, because threads are a part of the "
                "measure; leave it out of cluster.classes"
            )
        return given

    @model_validator(mode="after")
    def _custom_only(self) -> "WorkerClass":
        if taken := sorted({"CPU", "GPU", "memory", "object_store_memory"} & self.resources.keys()):
            raise ValueError(
                f"resources names {', '.join(taken)}, which Ray counts itself; use gpus_per_worker, memory_gib or "
                "cluster.threads_per_worker"
            )
        return self

    def needs(self, threads: int) -> str:
        """What one of them takes of a node, for people."""
        gpus = "a GPU if there is one" if self.gpus_per_worker is None else f"{self.gpus_per_worker:g} GPUs"
        custom = [f"{amount:g} {name}" for name, amount in sorted(self.resources.items())]
        labels = [f"label {name}={value}" for name, value in sorted(self.labels.items())]
        memory = [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        return " and ".join([f"{threads} CPUs", gpus, *memory, *custom, *labels])


class ClusterConfig(Section):
    """Who does the work. Of these only threads_per_worker and mixed_numerics can change a bit of the result."""

    executor: Literal["auto", "inline", "ray"] = "auto"
    """inline: in this process; ray: actors; auto: ray if there is more than one worker."""
    workers: PositiveInt = 1
    """Actors."""
    threads_per_worker: PositiveInt = 2
    """Threads of one worker; part of the measure."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """null: 1 if the model runs on a GPU, else 0."""
    classes: tuple[WorkerClass, ...] = ()
    """Workers of several kinds, instead of workers and gpus_per_worker."""
    mixed_numerics: bool = False
    """Let nodes that compute other bits join in; the measure is then a mixed one, which no run repeats to the bit."""
    address: str = Field(
        default="local", pattern=r"^(local|auto|(ray://)?[^\s/:]+:[0-9]{1,5}|(ray://)?\[[0-9a-fA-F:]+\]:[0-9]{1,5})$"
    )
    """local: a private Ray on this machine; auto: the cluster that this machine is a node of; host:port: the same,
    by its head; ray://host:port: a cluster from outside, through its client server."""
    wait_for_resources_seconds: float = Field(default=0.0, ge=0)
    """How long to wait for a node that a worker fits on, if none does now; for clusters that grow on demand."""
    max_attempts: PositiveInt = 3
    """A shard that fails this often by breaking its worker is quarantined."""
    deadline_seconds: float | None = Field(default=None, gt=0)
    """A task that takes longer is taken from its worker; null: 20 x the median so far, at least 300 s."""

    @model_validator(mode="after")
    def _one_way(self) -> "ClusterConfig":
        if self.classes and (self.workers != 1 or self.gpus_per_worker is not None):
            raise ValueError(
                "classes say how many workers there are and what they take; leave out workers and gpus_per_worker"
            )
        return self

    @property
    def worker_classes(self) -> tuple[WorkerClass, ...]:
        """The classes; where none are named, the one of `workers` and `gpus_per_worker`."""
        return self.classes or (WorkerClass(workers=self.workers, gpus_per_worker=self.gpus_per_worker),)

    @property
    def num_workers(self) -> int:
        """Of all classes."""
        return sum(kind.workers for kind in self.worker_classes)


class StoreConfig(Section):
    """Where everything is kept."""

    root: str = "runs"
    """A local directory."""


class CatalogConfig(Section):
    """What readers will find."""

    name: Name = "default"
    """Its folder under <root>/catalogs."""


EMBEDDED_SAES = (SaeConfig(path="embedded:resid_post_7"), SaeConfig(path="embedded:resid_post_15"))
