"""Whether a loaded model is the one that its files describe: no tensor made up, left out or broken, every id known.

A library that loads weights fills what it does not find with random numbers, and leaves aside what it cannot place.
Such a model computes, and an SAE may even fit it; so the loading report is read here, and refused.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sae_census.errors import CheckpointError, ConfigError

_SHOWN = 3
_COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that old files hold and that a model computes for itself."""
_OTHER_PARTS = re.compile(r"^(model\.)?(vision|visual|audio|image|multi_modal|mm_|mtp)")
"""Parts of larger models that a language model taken from them has not: towers, projectors, extra heads."""


class MissingHead(nn.Module):
    """In the place of a head that the files do not hold; whoever asks for it gets an error instead of noise."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            self._refuse()
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises CheckpointError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise CheckpointError(
            f"model {self._name} was saved without its head, so it predicts no token; expected a directory that the "
            "causal language model wrote"
        )


def check_report(model: Any, report: Mapping[str, Any], name: str, *, allow_headless: bool = True) -> tuple[str, ...]:
    """Prove from a loading report that a model's tensors are those of its files.

    A head that is missing whole is replaced by a `MissingHead`: files of the class without a head have none.

    Args:
        model: of transformers, just loaded.
        report: its `output_loading_info`.
        name: of the model, for the message.
        allow_headless: whether the head may be missing.

    Returns:
        Tensors of the files that belong to no part of this model, such as a value head; they were left out.

    Raises:
        CheckpointError: naming tensors that are missing, of another size, or of a part of this model and not known.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    head = _head(model)
    if allow_headless and head and head <= missing:
        missing -= head
        model.set_output_embeddings(MissingHead(name))
    unexpected = {key for key in unexpected if not _COMPUTED.search(key)}
    inside = {key for key in unexpected if _is_inside(model, key)}
    sizes = [
        f"{key} ({_size(there)} in the file, {_size(here)} in the model)"
        for key, there, here in report["mismatched_keys"]
    ]
    wrong = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("missing", missing), ("of another size", sizes), ("not known", inside))
        if names
    ]
    wrong += map(str, report["error_msgs"])
    if missing and unexpected - inside:
        wrong.append(f"{len(unexpected - inside)} under other names: {listed(unexpected - inside)}")
    if wrong:
        raise CheckpointError(
            f"the tensors of model {name} are not those that its config.json describes: {'; '.join(wrong)}; "
            f"{_advice(missing, unexpected)}"
        )
    return tuple(sorted(unexpected))


def converted_wrongly(logged: Collection[str]) -> str:
    """Which tensors could not be put together (experts are stored one by one), from a report in a log; "" if none."""
    lines = [line.strip() for report in logged if "CONVERSION" in report for line in report.splitlines()]
    return "; ".join(line.removeprefix("Error: ") for line in lines if line.startswith("Error: "))


def _head(model: Any) -> set[str]:
    """The tensors of the head, where it has any of its own."""
    head = model.get_output_embeddings()
    if head is None:
        return set()
    mine = {id(tensor) for tensor in head.parameters()}
    tied = {id(tensor) for tensor in model.base_model.parameters()}
    return {key for key, tensor in model.named_parameters() if id(tensor) in mine - tied}


def _is_inside(model: Any, key: str) -> bool:
    """Whether a name lies in a part that this model has, so that the tensor would change what it computes."""
    if _OTHER_PARTS.match(key):
        return False
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.base_model.named_children()} | {name for name, _ in model.named_children()}
    return key.startswith(prefix) or key.split(".")[0] in parts


def _size(shape: Collection[int]) -> str:
    return "x".join(map(str, shape))


def listed(names: Collection[str]) -> str:
    """The first few names, sorted."""
    return ", ".join(sorted(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _advice(missing: Collection[str], unexpected: Collection[str]) -> str:
    for key in sorted(unexpected):
        for wanted in missing:
            if key.endswith(f".{wanted}"):
                return (
                    f"the names begin with {key.removesuffix(wanted)!r}, which a wrapper adds; save the model that is "
                    "inside the wrapper"
                )
    return "is the directory whole, and is its config.json the one that was saved with it?"


def check_values(model: nn.Module, name: str) -> None:
    """Prove that every parameter was loaded and is finite.

    Raises:
        CheckpointError: naming those that are not.
    """
    found = list(model.named_parameters())
    if empty := [key for key, tensor in found if tensor.is_meta]:
        raise CheckpointError(f"{len(empty)} tensors of model {name} were not loaded: {listed(empty)}")
    if broken := [key for key, tensor in found if not _is_finite(tensor.detach())]:
        raise CheckpointError(
            f"{len(broken)} tensors of model {name} hold NaN or infinite values: {listed(broken)}; fetch or save it "
            "again, or try model.dtype=float32 or bfloat16 if it was loaded in float16"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # One pass without a mask in memory: NaN and Inf survive a sum. A sum that overflows is looked at again.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def check_ids(largest: int, num_embeddings: int, num_tokens: Callable[[], int], text: Callable[[int], str]) -> None:
    """Prove that a model has a row for every token.

    Args:
        largest: of the ids.
        num_embeddings: rows of the embedding.
        num_tokens: size of the tokenizer; asked only if there is an error.
        text: of a token; asked only if there is an error.

    Raises:
        ConfigError: if it has not.
    """
    if largest >= num_embeddings:
        raise ConfigError(
            f"token {largest} ({text(largest)!r}) is beyond the model's embedding: the tokenizer has {num_tokens()} "
            f"tokens, the embedding {num_embeddings} rows; use the tokenizer that belongs to this model, or enlarge "
            "the embedding and train the new rows"
        )
