"""What a causal language model writes into the residual stream, read block by block for tracing.

Knows the module tree and nothing of transformers. Attention runs in its plain ("eager") form while it is read,
because no other gives its pattern away.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_census.compute.effects.linear import Attention, FrozenNorm, ResidualWrites, freeze
from sae_census.errors import CheckpointError
from sae_census.io.model.blocks import Block, bias_of, block_of, matrix
from sae_census.io.model.families import family_of, streams_of
from sae_census.io.model.hooks import Captures, check_point, find_blocks
from sae_census.types import HookPoint

_PROBE = 1e4
"""Large against any epsilon of a norm, exact in float32."""
_IDS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """One context, read at some tokens."""

    writes: ResidualWrites
    streams: dict[HookPoint, Tensor]
    """(Q, D) by hook point: those asked for, and the residual points that they are functions of."""


def frozen(norm: nn.Module, x: Float[Tensor, "Q D"]) -> FrozenNorm:
    """A LayerNorm or RMSNorm module, frozen at the rows of `x`."""
    ones = torch.ones_like(x[0])
    if isinstance(norm, nn.LayerNorm):
        gain = ones if norm.weight is None else norm.weight
        shift = 0 * ones if norm.bias is None else norm.bias
        return freeze(x, norm(x), gain=gain, shift=shift, centred=True)
    # Families disagree on whether the gain is the weight or 1 + the weight; the module itself knows.
    return freeze(x, norm(x), gain=norm(_PROBE * ones), shift=0 * ones, centred=False)


class Paths:
    """The ways by which a causal language model writes to its residual stream."""

    def __init__(self, inner: Any):
        """Find the parts.

        Args:
            inner: the module of a `LanguageModel`, before any of its blocks are dropped.

        Raises:
            ConfigError: if the family is not supported.
        """
        config = inner.config.get_text_config()
        self._inner, self._base = inner, inner.base_model
        self._family, self._taps = family_of(config.model_type), streams_of(config)
        self._modules = find_blocks(self._base, config.num_hidden_layers)
        self.num_heads: int = config.num_attention_heads
        num_groups = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.blocks = [
            block_of(module, self._family, self._taps, self.num_heads, num_groups) for module in self._modules
        ]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self._embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype: torch.dtype = self._embedding.weight.dtype
        return dtype

    @property
    def _embedding(self) -> Any:
        return self._base.get_input_embeddings()

    def base_of(self, point: HookPoint) -> HookPoint | None:
        """The nearest residual point of which the activations at `point` are a function, token by token.

        A residual point is its own; inside attention there is none, because attention mixes tokens.
        """
        if point.stream in ("attn_out", "attn_z"):
            return None
        if point.stream.startswith("resid"):
            return point
        return HookPoint(point.layer, "resid_mid" if "resid_mid" in self._taps else "resid_pre")

    def tail(
        self, point: HookPoint, at: Float[Tensor, "N D"] | None = None
    ) -> Callable[[Float[Tensor, "N D"]], Tensor]:
        """The function from the residual stream at `base_of(point)` to the activations at `point`.

        Args:
            point: not inside attention.
            at: freeze every norm on the way at the scale it has for these rows; the function then takes as many.
        """
        if point.stream.startswith("resid"):
            return lambda x: x
        block = self.blocks[point.layer]
        first = block.mlp_norm if at is None else frozen(block.mlp_norm, at)
        if point.stream == "mlp_in":
            return first
        if point.stream == "mlp_post":
            return lambda x: _entering(block.down, block.mlp, first(x))
        if block.after_mlp is None:
            return lambda x: block.mlp(first(x))
        last = block.after_mlp if at is None else frozen(block.after_mlp, block.mlp(first(at)))
        return lambda x: last(block.mlp(first(x)))

    def read(self, input_ids: Tensor, points: Iterable[HookPoint], positions: Sequence[int]) -> Readings:
        """One forward pass over a context, as deep as `points` need.

        Args:
            input_ids: (T,) ids of the context.
            points: hook points whose activations are wanted.
            positions: the Q tokens to read at, 0 <= position < T.

        Raises:
            ConfigError: if the model has no such hook point.
            CheckpointError: if its attention does not give its pattern away.
        """
        wanted = sorted(set(points))
        for point in wanted:
            check_point(point, self._taps, len(self.blocks))
        bases = {base for point in wanted if (base := self.base_of(point))}
        num_attention = max((p.layer + (p.stream != "resid_pre") for p in bases | set(wanted)), default=0)
        num_mlps = max((p.layer + (p.stream == "resid_post") for p in bases), default=0)
        streams = {*wanted, *bases, HookPoint(0, "resid_pre")}
        streams |= {HookPoint(layer, "attn_out") for layer in range(num_attention)}
        streams |= {HookPoint(layer, "mlp_out") for layer in range(num_mlps)}
        where = torch.tensor(positions, device=self.device)
        with (
            self._eager(),
            _Watch(self.blocks[:num_attention], where) as watch,  # first, so that it also sees the last block
            Captures(self._modules, self._taps, streams) as captures,
        ):
            got = captures.run(self._base, input_ids[None].to(self.device))
        at = {point: value[0, where] for point, value in got.items()}
        origin = at[HookPoint(0, "resid_pre")]
        position = self._position(where, origin)
        writes = ResidualWrites(
            positions=tuple(positions),
            embed=origin - position,
            position=position,
            attention=tuple(self._attention(layer, watch) for layer in range(num_attention)),
            mlps=tuple(at[HookPoint(layer, "mlp_out")] for layer in range(num_mlps)),
        )
        return Readings(writes=writes, streams={point: at[point] for point in {*wanted, *bases}})

    def _position(self, where: Tensor, like: Tensor) -> Tensor:
        name = self._family.positions
        return torch.zeros_like(like) if name is None else self._base.get_submodule(name)(where)

    def _attention(self, layer: int, watch: "_Watch") -> Attention:
        block = self.blocks[layer]
        take = block.values.take
        fused = watch.values[layer]
        bias = take(bias_of(block.values.module, fused.shape[-1]))
        w_out = matrix(block.w_out)
        after = block.after_attention
        return Attention(
            pattern=watch.patterns[layer],
            values=take(fused) - bias,
            value_bias=bias,
            w_out=w_out,
            b_out=bias_of(block.w_out, w_out.shape[1]),
            norm=None if after is None else frozen(after, watch.written[layer]),
        )

    def embedding_rows(self) -> Float[Tensor, "V D"]:
        """What every token of the vocabulary writes into the stream, without its position.

        The model itself says it, because families scale embeddings, or norm them, in places of their own.
        """
        ids = torch.arange(self._embedding.weight.shape[0])
        start = HookPoint(0, "resid_pre")
        rows = []
        with Captures(self._modules, self._taps, [start]) as captures:
            for some in ids.split(_IDS):
                got = captures.run(self._base, some[:, None].to(self.device))[start][:, 0]
                rows.append(got - self._position(torch.zeros_like(some, device=self.device), got))
        return torch.cat(rows)

    def head_matrices(self, layer: int) -> tuple[Float[Tensor, "H D E"], ...]:
        """W_Q, W_K, W_V of every head of a block, (H, D, E) each; heads of a group share keys and values."""
        block = self.blocks[layer]
        found = []
        for part in (block.queries, block.keys, block.values):
            heads = part.take(matrix(part.module)).transpose(0, 1)
            found.append(heads.repeat_interleave(self.num_heads // len(heads), dim=0))
        return tuple(found)

    @contextmanager
    def _eager(self) -> Iterator[None]:
        before = self._inner.config._attn_implementation
        self._inner.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._inner.set_attn_implementation(before)


def _entering(inner: nn.Module, outer: nn.Module, x: Tensor) -> Tensor:
    """What enters `inner` when `outer` runs on `x`; gradients pass."""
    got: list[Tensor] = []
    handle = inner.register_forward_pre_hook(lambda _module, args: got.append(args[0]))
    try:
        outer(x)
    finally:
        handle.remove()
    return got[0]


class _Watch:
    """Reads patterns, values and outputs of some blocks' attention during one forward pass over one context."""

    def __init__(self, blocks: Sequence[Block], where: Tensor):
        self._blocks, self._where = blocks, where
        self.patterns: dict[int, Tensor] = {}
        """(H, Q, T)."""
        self.values: dict[int, Tensor] = {}
        """(T, O), as the module of values gives them."""
        self.written: dict[int, Tensor] = {}
        """(Q, D), behind the output matrix and before any norm."""
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for layer, block in enumerate(self._blocks):
            self._handles.append(block.values.module.register_forward_hook(self._values_hook(layer)))
            self._handles.append(block.attention.register_forward_hook(self._attention_hook(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _values_hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            self.values[layer] = output[0]

        return hook

    def _attention_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, tuple) or output[1] is None:
                raise CheckpointError(f"{type(module).__name__} does not say where it attends; it cannot be traced")
            self.patterns[layer] = output[1][0, :, self._where]
            self.written[layer] = output[0][0, self._where]

        return hook
