"""What needs the model's head: continuations of prompts, reproducible by seed, and the entropy of the next token.

Sampling adds Gumbel noise of a generator that belongs to the prompt, so a continuation does not depend on its
neighbours in a batch by more than rounding.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_census.errors import DeadlineError
from sae_census.io.model.families import family_of
from sae_census.io.model.language_model import LanguageModel

_TILE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long somebody waits for a continuation."""

    until: float
    """As `time.monotonic()`."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set by another thread once nobody waits any more."""

    @property
    def is_over(self) -> bool:
        """Whether to give up."""
        return self.gone.is_set() or time.monotonic() > self.until

    def check(self) -> None:
        """Give up, if it is time to.

        Raises:
            DeadlineError: if it is; half a continuation is none.
        """
        if self.gone.is_set():
            raise DeadlineError("nobody waits for the continuation any more")
        if self.is_over:
            raise DeadlineError("the continuation was not done in time; ask for fewer gen_tokens")


def next_token_entropy(model: LanguageModel, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """Entropy in nats of the next token after every token, on the CPU, float32.

    Args:
        model: whose head is asked, in tiles of tokens.
        hidden: its last hidden states.
    """
    head = model.inner.get_output_embeddings()
    config = model.inner.config.get_text_config()
    capped = family_of(config.model_type).logit_cap
    cap = getattr(config, capped, None) if capped else None
    found = []
    with torch.inference_mode():
        for tile in hidden.flatten(0, 1).split(_TILE):
            logits = head(tile).float()
            if cap:
                logits = torch.tanh(logits / cap) * cap
            found.append(torch.special.entr(logits.softmax(dim=1)).sum(dim=1).cpu())
    return torch.cat(found).view(hidden.shape[:2])


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    patience: Patience | None = None,
) -> list[list[int]]:
    """Continuations of the prompts as token ids, each up to and without the model's end token.

    Args:
        model: with its head.
        prompts: token ids, none empty.
        pad_id: fills the left of shorter prompts.
        max_new_tokens: at most this many.
        do_sample: sample, instead of taking the likeliest token.
        temperature: of sampling.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of sampling, the same for every prompt.
        patience: when to give up; asked at every token.

    Raises:
        DeadlineError: if patience is over.
    """
    from transformers import GenerationConfig

    clear_settings(model)
    ends = end_ids(model)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=ends or None, use_cache=True
    )
    with torch.inference_mode():
        whole = model.inner.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=_sampling(len(prompts), temperature, top_p, seed) if do_sample else [],
            stopping_criteria=[] if patience is None else [_stop_after(patience, len(prompts))],
        )
    if patience is not None:
        patience.check()
    return [_until_end(row, ends) for row in whole[:, longest:].tolist()]


def clear_settings(model: LanguageModel) -> None:
    """Drop how the checkpoint wants to generate, but for its end tokens.

    What a call of `generate` does not say is taken from there: penalties, beams, forced tokens, time limits, stop
    strings.
    """
    from transformers import GenerationConfig

    model.inner.generation_config = GenerationConfig(eos_token_id=end_ids(model) or None)


def end_ids(model: LanguageModel) -> list[int]:
    """The tokens that end a continuation."""
    ends = model.inner.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def _sampling(num_rows: int, temperature: float, top_p: float, seed: int) -> list[Callable[..., Any]]:
    """Processors after which the greatest score is a sample (Gumbel's maximum)."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    generators = [torch.Generator().manual_seed(seed) for _ in range(num_rows)]

    def add_noise(_: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        noise = [torch.empty(scores.shape[1]).exponential_(generator=one).log() for one in generators]
        return scores.float() - torch.stack(noise).to(scores.device)

    warpers: list[Callable[..., Any]] = [TemperatureLogitsWarper(temperature)]
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return [*warpers, add_noise]


def _stop_after(patience: Patience, num_rows: int) -> Callable[..., Any]:
    def over(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((num_rows,), patience.is_over, device=ids.device)

    return over
