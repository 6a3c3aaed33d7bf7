"""One pass over a stream of activation batches: what counts, what fires, and which contexts they were."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sae_census.compute.notebook.subsamples import Context
from sae_census.compute.numbers.codes import Codes
from sae_census.errors import ConfigError
from sae_census.flows.notebook.encoders import Batch, Encoder

ADDRESS = {"context_idx": 0, "shard_idx": 0, "n_shards": 1}
"""Metadata that every context has, with what they are if the stream does not say; contexts are then numbered."""
RESERVED = ("name", "group", "feature_acts_indices", "feature_acts_values", "start", "stop")
"""Fields of a sampling; metadata of these names would hide them."""


@runtime_checkable
class ActivationFactory(Protocol):
    """Makes a stream; every call gives the same contexts."""

    def process(self, **kwargs: Any) -> Iterable[Batch]: ...


Stream = ActivationFactory | Callable[..., Iterable[Batch]] | Iterable[Batch]


def opener(stream: Stream, kwargs: Mapping[str, Any], *, twice: bool) -> Callable[[], Iterable[Batch]]:
    """What opens the stream.

    Args:
        stream: an object with `process`, a function that returns batches, or the batches themselves.
        kwargs: for `process` or the function.
        twice: whether it will be opened twice.

    Raises:
        ConfigError: if it cannot be.
    """
    if callable(process := getattr(stream, "process", stream)):
        return lambda: process(**kwargs)
    if not isinstance(stream, Iterable) or kwargs:
        raise ConfigError(
            f"the stream is a {type(stream).__name__}{f' with arguments {dict(kwargs)}' if kwargs else ''}; expected "
            "an object with process(...), a function that takes them, or, without arguments, batches"
        )
    if twice and iter(stream) is stream:
        raise ConfigError(
            f"the stream is a {type(stream).__name__}, which can be read only once, and a proportion between 0 and 1 "
            "needs a second pass, because the final maximum is known after the first; give the function that makes "
            "the stream, or a list"
        )
    return lambda: stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A batch as the statistics see it."""

    codes: Codes
    """Of counted tokens; rows index `contexts`."""
    contexts: list[Context]
    counted: Bool[np.ndarray, " B"]
    """Which contexts have counted tokens."""


@dataclass(slots=True, kw_only=True)
class Reading:
    """A pass; iterate once, then read the books."""

    encoder: Encoder
    keep: Callable[[Batch], Tensor]
    """Which tokens of a batch count, (B, T)."""
    max_tokens: int
    """Stop after the batch that reaches this many tokens, counted or not."""
    seed: int
    num_features: int = field(default=0, init=False)
    num_contexts: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)
    tokens_counted: int = field(default=0, init=False)
    fingerprint: int = field(default=0, init=False)
    """Sum of the contexts' digests: equal for equal contexts in any order."""

    def of(self, batches: Iterable[Batch]) -> Iterator[Coded]:
        """The batches with their codes, as far as `max_tokens`.

        Raises:
            ConfigError: if one is not as expected.
            ShardError: if activations or codes of counted tokens are NaN or infinite.
        """
        self.num_features = self.encoder.num_features or 0
        for batch in batches:
            if "tokens" not in batch:
                raise ConfigError(f"a batch has no tokens (B, T); it has {', '.join(batch) or 'nothing'}")
            tokens, counted = torch.as_tensor(batch["tokens"]), self.keep(batch)
            if tokens.shape != counted.shape or tokens.ndim != 2:
                raise ConfigError(f"tokens are {tuple(tokens.shape)}, mask {tuple(counted.shape)}; expected (B, T)")
            with torch.no_grad():
                codes, num_features = self.encoder.codes(batch, counted)
            if num_features != (self.num_features or num_features):
                raise ConfigError(f"codes have {num_features} features; expected {self.num_features}")
            self.num_features = num_features
            contexts = self._contexts(tokens.cpu().numpy().astype(np.int64), batch.get("meta"))
            self.num_tokens += counted.numel()
            self.tokens_counted += int(counted.sum())
            self.fingerprint += sum(context.digest for context in contexts)
            yield Coded(codes=codes, contexts=contexts, counted=counted.any(dim=1).cpu().numpy())
            if self.num_tokens >= self.max_tokens:
                return

    def _contexts(self, tokens: Int64[np.ndarray, "B T"], meta: Sequence[Mapping[str, Any]] | None) -> list[Context]:
        meta = meta or [{}] * len(tokens)
        if len(meta) != len(tokens):
            raise ConfigError(f"a batch has {len(tokens)} contexts and meta of {len(meta)}; expected one for each")
        return [self._context(row, said) for row, said in zip(tokens, meta, strict=True)]

    def _context(self, tokens: Int64[np.ndarray, " T"], said: Mapping[str, Any]) -> Context:
        plain = {str(key): value.item() if hasattr(value, "item") else value for key, value in said.items()}
        if hidden := sorted(set(plain) & set(RESERVED)):
            raise ConfigError(f"meta of a context has {', '.join(hidden)}, which every sampling has; rename it")
        content = json.dumps(plain, sort_keys=True, default=str).encode() + tokens.tobytes()
        digest = hashlib.blake2b(content, digest_size=8, key=self.seed.to_bytes(8)).digest()
        metadata = ADDRESS | {"context_idx": self.num_contexts} | plain
        shard_idx, context_idx = metadata["shard_idx"], metadata["context_idx"]
        if not isinstance(shard_idx, int) or not isinstance(context_idx, int):
            raise ConfigError(
                f"meta gives shard_idx {shard_idx!r}, context_idx {context_idx!r}; expected whole numbers"
            )
        self.num_contexts += 1
        return Context(
            shard_idx=shard_idx,
            context_idx=context_idx,
            digest=min(int.from_bytes(digest) >> 1, (1 << 63) - 2),
            num_positions=len(tokens),
            metadata=metadata,
        )
