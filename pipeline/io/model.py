"""Models of transformers: what their configs say, and a loaded decoder that yields activations at hook points."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.io.hooks import Captures, Tap, layout_of, streams_of
from pipeline.io.pretrained import WEIGHT_PATTERNS, digest, first_line, resolve
from pipeline.io.tokenizer import Tokenizer
from pipeline.types import HookPoint, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model without loading its weights."""

    digest: str
    """sha256 of config and weight files (a directory), or of id and commit (the hub)."""
    family: str
    num_layers: int
    d_model: int
    max_positions: int
    """0 if the config does not say."""
    taps: dict[Stream, Tap]
    """The streams that the family has."""


def model_facts(model_id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's config and hash its files.

    Raises:
        CheckpointError: if there is no such model.
        ConfigError: if its family is not supported.
    """
    from transformers import AutoConfig

    source = resolve(model_id, revision)
    try:
        whole = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, the cache and the parsers each have errors of their own
        raise CheckpointError(f"model.id {model_id} has no readable config: {first_line(error)}") from error
    config = whole.get_text_config()
    return ModelFacts(
        digest=digest(source, (*WEIGHT_PATTERNS, "config.json"), getattr(whole, "_commit_hash", None)),
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        taps=streams_of(config),
    )


class LanguageModel:
    """A loaded decoder in evaluation mode that yields activations at hook points."""

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        source = resolve(model_id, revision)
        try:
            self.inner = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise CheckpointError(f"no model could be loaded from {model_id}: {first_line(error)}") from error
        self.inner.eval().requires_grad_(False).to(device)
        self._blocks, self._taps = layout_of(self.inner)
        self.device = device
        self._origin = (model_id, revision, trust_remote_code)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to it, loaded when first asked for."""
        model_id, revision, trust_remote_code = self._origin
        return Tokenizer(model_id, revision, trust_remote_code=trust_remote_code)

    @property
    def attention(self) -> str:
        """The implementation of attention that it runs."""
        return str(self.inner.config.get_text_config()._attn_implementation)

    def captures(self, points: Iterable[HookPoint]) -> Captures:
        """Hooks for these points, to be entered with `with`.

        Raises:
            ConfigError: if a layer is out of range or the family lacks the stream.
        """
        return Captures(self._blocks, self._taps, points)

    def run(self, captures: Captures, input_ids: Tensor) -> dict[HookPoint, Tensor]:
        """One forward pass over (B, T) ids, as far as the deepest hook; tensors (B, T, width) by hook point."""
        return captures.run(self.inner.base_model, input_ids.to(self.device))

    def run_whole(self, captures: Captures, input_ids: Tensor) -> tuple[dict[HookPoint, Tensor], Tensor]:
        """As `run`, but to the end of the model: also its last hidden state (B, T, D), ready for the head."""
        return captures.run_whole(self.inner.base_model, input_ids.to(self.device))

    def widths(self, points: Iterable[HookPoint]) -> dict[HookPoint, int]:
        """The width of the activations at each hook point, by running one token."""
        with self.captures(points) as captures:
            got = self.run(captures, torch.zeros((1, 1), dtype=torch.long))
        return {point: value.shape[-1] for point, value in got.items()}

    def drop_above(self, layer: int) -> None:
        """Free the blocks above `layer` and the head: a forward that stops there never needs them."""
        if not hasattr(self.inner.base_model, "language_model"):
            del self._blocks[layer + 1 :]
            if hasattr(self.inner, "lm_head"):
                self.inner.lm_head = nn.Identity()
