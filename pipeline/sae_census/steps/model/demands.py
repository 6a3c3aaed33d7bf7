"""What the metadata of SAEs demands and a run does not give: each one sentence, with what to set.

Nothing here looks at activations; how well an SAE fits them is the preflight's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sae_census.io.checkpoints import LoadedSae
from sae_census.io.model.centring import is_centred
from sae_census.io.model.families import FAMILIES, with_layer_norms
from sae_census.types import SiteKey

WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Streams that centring changes."""
_MAX_LISTED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """Something that does not belong together."""

    text: str
    is_error: bool
    """Whether it surely changes numbers, so that preflight=refuse refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run gives."""

    model_id: str
    family: str
    dtype: str
    is_centred: bool
    """Whether the model's writing weights are centred."""
    bos: bool
    """Whether contexts begin with BOS."""
    context_length: int
    sources: tuple[str, ...]
    """What the corpus was read from."""
    special_ids: frozenset[int]
    """Of the tokenizer."""
    special_tokens: bool
    """Whether the masks leave special tokens out."""
    first_positions: int
    """So many at the start of every context are left out,"""
    positions: tuple[int, ...]
    """and so are these."""

    @property
    def can_be_centred(self) -> bool:
        """Whether centring leaves the model's predictions as they are, and is still to be done."""
        return self.family in with_layer_norms() and not self.is_centred

    def is_counted(self, position: int) -> bool:
        """Whether the census counts tokens at a position of every context."""
        is_bos = position == 0 and self.bos and self.special_tokens
        return not (is_bos or position < self.first_positions or position in self.positions)


def demands(saes: Mapping[SiteKey, LoadedSae], run: Run) -> list[Complaint]:
    """What these SAEs were trained with and this run lacks; those of which the same is to be said stand together."""
    sites: dict[Complaint, list[str]] = {}
    for site, loaded in saes.items():
        for complaint in _of_one(loaded, run):
            sites.setdefault(complaint, []).append(str(site))
    return [Complaint(text=f"{', '.join(them)}: {one.text}", is_error=one.is_error) for one, them in sites.items()]


def centring(loaded: LoadedSae, *, is_centred: bool, can_be_centred: bool) -> Complaint | None:
    """What is wrong between the model that an SAE was trained on and the one at hand, as to its writing weights."""
    metadata = loaded.metadata
    if loaded.hook_point.stream not in WRITTEN:
        return None
    said = (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
    if said is True and can_be_centred:
        return Complaint(
            text="trained on a model with centred writing weights, which this one has not; "
            "model.center_writing_weights=true would match",
            is_error=True,
        )
    if said is False and is_centred:
        return Complaint(
            text="trained on a model whose writing weights were not centred, as they are here; "
            "model.center_writing_weights=false would match",
            is_error=True,
        )
    if (like := metadata.get("looks_like_centred_release")) and can_be_centred:
        return Complaint(
            text=f"looks like the release {like}, which was trained on centred writing weights, as only SAELens' list "
            "of releases says; if it is, model.center_writing_weights=true would match",
            is_error=False,
        )
    return None


def centring_of(loaded: LoadedSae, model: nn.Module) -> Complaint | None:
    """The same of a model that is loaded."""
    config: Any = getattr(model, "config", None)
    family = config.get_text_config().model_type if hasattr(config, "get_text_config") else ""
    done = family in with_layer_norms() and is_centred(model)
    return centring(loaded, is_centred=done, can_be_centred=family in with_layer_norms() and not done)


def _of_one(loaded: LoadedSae, run: Run) -> Iterator[Complaint]:
    metadata = loaded.metadata
    found = centring(loaded, is_centred=run.is_centred, can_be_centred=run.can_be_centred)
    if found:
        yield found
    yield from _bos(metadata, run)
    yield from _positions(metadata, run)
    yield from _special_tokens(metadata, run)
    yield from _model(metadata, run)
    size = metadata.get("context_size")
    if isinstance(size, int) and not isinstance(size, bool) and size != run.context_length:
        yield Complaint(
            text=f"trained on contexts of {size} tokens, but these have {run.context_length}; "
            f"corpus.context_length={size} would match",
            is_error=False,
        )
    dataset = metadata.get("dataset_path")
    if isinstance(dataset, str) and dataset and not any(dataset in source for source in run.sources):
        yield Complaint(text=f"trained on {dataset}; corpus.source={dataset} would match", is_error=False)
    dtype = _dtype(metadata)
    if dtype == "float32" and run.dtype != dtype:
        yield Complaint(
            text=f"trained in {dtype}, but the model computes in {run.dtype}; model.dtype={dtype} would match",
            is_error=False,
        )


def _bos(metadata: Mapping[str, Any], run: Run) -> Iterator[Complaint]:
    trained = metadata.get("prepend_bos")
    if isinstance(trained, bool) and trained != run.bos:
        yield Complaint(
            text=f"trained {'with' if trained else 'without'} BOS, but this corpus has {'one' if run.bos else 'none'}; "
            f"corpus.bos={'always' if trained else 'never'} would match",
            is_error=True,
        )


def _positions(metadata: Mapping[str, Any], run: Run) -> Iterator[Complaint]:
    """Positions that training left out and this run counts; beyond the trained context nothing is known."""
    given = metadata.get("seqpos_slice")
    if not isinstance(given, list | tuple) or not 1 <= len(given) <= 3:
        return
    size = metadata.get("context_size")
    size = size if isinstance(size, int) and size > 0 else run.context_length
    try:
        trained = set(range(size)[slice(*given)])
    except (TypeError, ValueError):
        return
    extra = [p for p in range(min(size, run.context_length)) if p not in trained and run.is_counted(p)]
    if not extra:
        return
    masked = [p for p in range(min(size, run.context_length)) if p not in trained]
    start = len(masked)
    if masked == list(range(start)):
        advice = f"masks.first_positions={start} would match"
    elif len(extra) <= _MAX_LISTED:
        advice = f"masks.positions=[{','.join(map(str, masked))}] would match"
    else:
        advice = f"masks.positions with all {len(masked)} positions outside that slice would match"
    yield Complaint(
        text=f"trained on positions {_slice(given)} of a context alone (seqpos_slice), but {len(extra)} others are "
        f"counted; {advice}",
        is_error=True,
    )


def _slice(parts: Sequence[int | None]) -> str:
    start, stop, *step = [None, *parts] if len(parts) == 1 else parts
    return ":".join("" if part is None else str(part) for part in (start, stop, *step))


def _special_tokens(metadata: Mapping[str, Any], run: Run) -> Iterator[Complaint]:
    excluded = metadata.get("exclude_special_tokens")
    if not excluded:
        return
    if not run.special_tokens:
        yield Complaint(
            text="trained without special tokens (exclude_special_tokens), but they are counted; "
            "masks.special_tokens=true would match",
            is_error=True,
        )
    others = sorted(set(excluded) - run.special_ids) if isinstance(excluded, list | tuple) else []
    if others:
        listed = ", ".join(map(str, others[:_MAX_LISTED])) + (", …" if len(others) > _MAX_LISTED else "")
        yield Complaint(
            text=f"trained without the tokens {listed} (exclude_special_tokens), which are not special tokens of this "
            "tokenizer and are counted; no mask leaves out tokens by id",
            is_error=False,
        )


def _model(metadata: Mapping[str, Any], run: Run) -> Iterator[Complaint]:
    """Names are compared where the run's model has one; families where the name tells one."""
    said = metadata.get("model_name")
    if not isinstance(said, str) or not said:
        return
    name = said.rsplit("/", 1)[-1].lower().replace("gpt2-small", "gpt2")
    families = [known for known, family in FAMILIES.items() if family.called and re.match(family.called, name)]
    if families and run.family not in families:
        yield Complaint(text=f"trained on {said}, but this model is of the family {run.family}", is_error=True)
        return
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", run.model_id) and not run.model_id.startswith(".")
    if is_hub_id and run.model_id.rsplit("/", 1)[-1].lower() != name:
        yield Complaint(text=f"trained on {said}, but model.id is {run.model_id}", is_error=False)


def _dtype(metadata: Mapping[str, Any]) -> str:
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    said = kwargs.get("dtype") or kwargs.get("torch_dtype") or metadata.get("dtype")
    return str(said).removeprefix("torch.")
