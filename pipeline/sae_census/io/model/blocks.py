"""The parts of a transformer block behind one interface: norms, projections and MLP of every family."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from sae_census.errors import ConfigError
from sae_census.io.model.families import Family, Tap
from sae_census.types import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Where the queries, keys or values of a block are computed, by heads of `size` each."""

    module: nn.Module
    num_heads: int
    size: int
    start: int = 0
    """The first of its columns, in a module that computes several."""
    third: int | None = None
    """Its place in a module that keeps query, key and value of a head side by side (GPT-NeoX)."""

    def take(self, columns: Tensor) -> Tensor:
        """From the outputs of the module (…, O), or the columns of its matrix, to (…, heads, size)."""
        *outer, _ = columns.shape
        if self.third is not None:
            return columns.reshape(*outer, self.num_heads, 3, self.size)[..., self.third, :]
        mine = columns[..., self.start : self.start + self.num_heads * self.size]
        return mine.reshape(*outer, self.num_heads, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The modules of one block that tracing needs."""

    attention: nn.Module
    attention_norm: nn.Module
    queries: Projection
    keys: Projection
    values: Projection
    w_out: nn.Module
    after_attention: nn.Module | None
    """A norm between attention and the residual stream (Gemma 2 and 3)."""
    mlp: nn.Module
    mlp_norm: nn.Module
    down: nn.Module
    """The MLP's last matrix."""
    after_mlp: nn.Module | None


def matrix(module: nn.Module) -> Float[Tensor, "I O"]:
    """The matrix of a linear module for row vectors (GPT-2 keeps it that way, `nn.Linear` transposed)."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, nn.Linear) else weight


def bias_of(module: nn.Module, size: int) -> Float[Tensor, " O"]:
    """The bias of a linear module with `size` outputs; zeros if it has none."""
    bias = getattr(module, "bias", None)
    return bias if bias is not None else matrix(module).new_zeros(size)


def block_of(module: nn.Module, family: Family, taps: Mapping[Stream, Tap], num_heads: int, num_groups: int) -> Block:
    """The parts of one block.

    Args:
        module: the block.
        family: of its model.
        taps: the streams of its model.
        num_heads: of queries.
        num_groups: heads of keys and values.

    Raises:
        ConfigError: if a part that every known family has is missing.
    """
    needed: tuple[Stream, ...] = ("attn_z", "attn_out", "mlp_post", "mlp_out")
    missing = [stream for stream in needed if stream not in taps]
    if missing:
        raise ConfigError(
            f"models without {missing[0]} (mixtures of experts, linear attention) cannot be traced; expected a family "
            "whose blocks have one attention of heads and one MLP"
        )
    z, attn_out, mlp_post, mlp_out = (taps[stream].path for stream in ("attn_z", "attn_out", "mlp_post", "mlp_out"))
    attention_path, mlp_path = z.rpartition(".")[0], mlp_post.rpartition(".")[0]
    attention, w_out = module.get_submodule(attention_path), module.get_submodule(z)
    size = matrix(w_out).shape[0] // num_heads
    queries, keys, values = _projections(attention, family, (num_heads, num_groups, num_groups), size)
    return Block(
        attention=attention,
        attention_norm=_part(module, family.attention_norm),
        queries=queries,
        keys=keys,
        values=values,
        w_out=w_out,
        after_attention=None if attn_out == attention_path else module.get_submodule(attn_out),
        mlp=module.get_submodule(mlp_path),
        mlp_norm=_part(module, family.mlp_norm),
        down=module.get_submodule(mlp_post),
        after_mlp=None if mlp_out == mlp_path else module.get_submodule(mlp_out),
    )


def _projections(attention: nn.Module, family: Family, counts: tuple[int, int, int], size: int) -> list[Projection]:
    """Queries, keys, values, of as many heads as `counts` says."""
    modules = [_part(attention, name) for name in family.projections]
    if len(modules) == 3:
        return [Projection(module=m, num_heads=n, size=size) for m, n in zip(modules, counts, strict=True)]
    (fused,) = modules
    if family.by_head:
        return [Projection(module=fused, num_heads=n, size=size, third=i) for i, n in enumerate(counts)]
    starts = (0, counts[0] * size, (counts[0] + counts[1]) * size)
    return [
        Projection(module=fused, num_heads=n, size=size, start=start) for n, start in zip(counts, starts, strict=True)
    ]


def _part(module: nn.Module, name: str) -> nn.Module:
    """A submodule that the family's record names."""
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"tracing needs {name} in {type(module).__name__}, which has none") from error
