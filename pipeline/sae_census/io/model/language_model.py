"""Models of transformers: what their configs say, and a loaded decoder that yields activations at hook points."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sae_census.errors import CheckpointError
from sae_census.io.loading import library_warnings
from sae_census.io.loading.pretrained import first_line, model_digest, resolve
from sae_census.io.loading.soundness import (
    MissingHead,
    check_ids,
    check_report,
    check_values,
    converted_wrongly,
    listed,
)
from sae_census.io.model import centring
from sae_census.io.model.families import Tap, streams_of
from sae_census.io.model.hooks import Captures, layout_of
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.types import HookPoint, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model by its config and the bytes of its files."""

    digest: str
    """sha256 of config and weight files (a directory), or of id and commit (the hub), and of whether it is centred."""
    family: str
    num_layers: int
    d_model: int
    num_embeddings: int
    """Rows of the embedding: token ids are below."""
    max_positions: int
    """0 if the config does not say."""
    taps: dict[Stream, Tap]
    """The streams that the family has."""


def model_facts(
    model_id: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    center_writing_weights: bool = False,
) -> ModelFacts:
    """Read a model's config and hash its files; a model that is centred when it is loaded has a digest of its own.

    Raises:
        CheckpointError: if there is no such model.
        ConfigError: if its family is not supported, or cannot be centred.
    """
    from transformers import AutoConfig

    source = resolve(model_id, revision)
    try:
        with library_warnings.captured():
            whole = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, the cache and the parsers each have errors of their own
        raise CheckpointError(f"model.id {model_id} has no readable config: {first_line(error)}") from error
    config = whole.get_text_config()
    found = model_digest(source, getattr(whole, "_commit_hash", None))
    if center_writing_weights:
        centring.check_family(config.model_type)
        found = centring.centred_digest(found)
    return ModelFacts(
        digest=found,
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        num_embeddings=config.vocab_size,
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        taps=streams_of(config),
    )


class LanguageModel:
    """A loaded decoder in evaluation mode that yields activations at hook points.

    >>> import torch
    >>> model = LanguageModel(model_dir, dtype=torch.float32, device=torch.device("cpu"))
    >>> model.facts.d_model, model.facts.num_layers
    (32, 3)
    >>> model.inner.training
    False
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        fix_mistral_regex: bool | None = None,
        center_writing_weights: bool = False,
    ):
        """Load a model and prove that every tensor of it is that of its files.

        A directory that was saved without a head gives a model that has none: what needs it raises CheckpointError.

        Args:
            model_id: a hub id, a local directory, a GGUF file, or the embedded model.
            revision: of a hub id.
            dtype: of the weights.
            device: where they lie.
            trust_remote_code: run model code from the hub.
            fix_mistral_regex: of its tokenizer.
            center_writing_weights: as `io.centring` does it; only for families with LayerNorms.

        Raises:
            CheckpointError: if it cannot be loaded, or tensors are missing, not known, of another size or not finite.
            ConfigError: if its family is not supported, or cannot be centred.
        """
        from transformers import AutoModelForCausalLM

        source = resolve(model_id, revision)
        heard: list[str] = []
        try:
            with library_warnings.captured() as heard:
                self.inner, report = AutoModelForCausalLM.from_pretrained(
                    source,
                    revision=revision,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # the report names them
                )
        except Exception as error:
            reason = converted_wrongly(heard) or first_line(error)
            raise CheckpointError(f"no model could be loaded from {model_id}: {reason}") from error
        if left_out := check_report(self.inner, report, model_id):
            library_warnings.pass_on(
                f"{len(left_out)} tensors of model {model_id} belong to no part of this architecture and were left "
                f"out: {listed(left_out)}"
            )
        self.inner.eval().requires_grad_(False)
        if center_writing_weights:
            centring.center_writing_weights(self.inner)
        self.inner.to(device)
        check_values(self.inner, model_id)
        self._blocks, self._taps = layout_of(self.inner)
        self.device = device
        self.num_embeddings: int = self.inner.get_input_embeddings().weight.shape[0]
        self._origin = (model_id, revision, trust_remote_code, fix_mistral_regex, center_writing_weights)

    @cached_property
    def facts(self) -> ModelFacts:
        """What is known of it; its files are hashed when this is first asked for, after they were loaded."""
        model_id, revision, trust, _, centred = self._origin
        return model_facts(model_id, revision, trust_remote_code=trust, center_writing_weights=centred)

    @property
    def is_headless(self) -> bool:
        """Whether it was saved without its head, and so predicts no token."""
        return isinstance(self.inner.get_output_embeddings(), MissingHead)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to it, loaded when first asked for."""
        model_id, revision, trust, fix, _ = self._origin
        return Tokenizer(model_id, revision, trust_remote_code=trust, fix_mistral_regex=fix)

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises ConfigError, naming the token, if an id is beyond the embedding."""
        largest = int(input_ids.max()) if input_ids.numel() else 0
        check_ids(
            largest, self.num_embeddings, lambda: self.tokenizer.size, lambda token: self.tokenizer.tokens([token])[0]
        )

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
        """One forward pass over (B, T) ids, as far as the deepest hook; tensors (B, T, width) by hook point.

        Raises:
            ConfigError: if an id is beyond the embedding.
        """
        self.check_ids(input_ids)
        return captures.run(self.inner.base_model, input_ids.to(self.device))

    def run_whole(self, captures: Captures, input_ids: Tensor) -> tuple[dict[HookPoint, Tensor], Tensor]:
        """As `run`, but to the end of the model: also its last hidden state (B, T, D), ready for the head."""
        self.check_ids(input_ids)
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
