"""Where a loaded model keeps the way from a stream to the logits: output matrices, final norm, unembedding.

Reads modules by the names in `sae_census.io.model.families`; runs nothing and knows no transformers.
"""

from typing import Any

from torch import Tensor, nn

from sae_census.compute.numbers.logits import FinalNorm, Unembedding, Writing
from sae_census.errors import ConfigError
from sae_census.io.model.families import FAMILIES, Family, family_of, streams_of
from sae_census.io.model.hooks import check_point, find_blocks
from sae_census.types import HookPoint, Stream

_OUT_OF: dict[Stream, Stream] = {"attn_z": "attn_out", "mlp_post": "mlp_out"}
"""What the output matrix makes of a stream."""


def check_path(point: HookPoint) -> None:
    """Raises ConfigError if what is written at a hook point has no direct path to the logits."""
    if point.stream == "mlp_in":
        raise ConfigError(
            f"{point} has no direct logits: what an SAE reconstructs there is read by the MLP alone and never reaches "
            "the residual stream; choose an SAE of resid_*, attn_out, attn_z, mlp_out or mlp_post"
        )


def read_unembedding(inner: Any, num_tokens: int) -> Unembedding:
    """The final norm and the unembedding of a causal language model.

    Args:
        inner: a model of a known family with its head; the head may be tied to the embedding.
        num_tokens: ids from here on are padding of the matrix that no tokenizer makes; they are left out.

    Raises:
        ConfigError: if the family is not known or the model has no head.
    """
    name, base, blocks = _parts(inner)
    family = family_of(name)
    if family.final_norm is None:
        known = ", ".join(name for name, one in FAMILIES.items() if one.final_norm)
        raise ConfigError(f"direct logits of {name} models are not known; expected one of {known}")
    home = next(name for name, module in base.named_modules() if module is blocks).rpartition(".")[0]
    head = inner.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise ConfigError(f"this {name} model has no unembedding matrix; expected a causal language model with a head")
    bias = None if head.bias is None else head.bias.detach()[:num_tokens]
    norm = _norm(base.get_submodule(home).get_submodule(family.final_norm), family)
    return Unembedding(norm=norm, weight=head.weight.detach()[:num_tokens], bias=bias)


def read_writing(inner: Any, point: HookPoint) -> Writing:
    """How the stream at a hook point reaches the residual stream.

    Raises:
        ConfigError: if it does not, or the model has no such hook point.
    """
    name, _, blocks = _parts(inner)
    family, taps = family_of(name), streams_of(_config(inner))
    check_point(point, taps, len(blocks))
    check_path(point)
    if point.stream not in _OUT_OF:  # Gemma's attn_out and mlp_out are read after their norms: nothing is left to do
        return Writing()
    block, inside, out = blocks[point.layer], taps[point.stream].path, taps[_OUT_OF[point.stream]].path
    gain = None if inside.startswith(f"{out}.") else _norm(block.get_submodule(out), family).gain
    return Writing(matrix=_matrix(block.get_submodule(inside)), gain=gain)


def _config(inner: Any) -> Any:
    return inner.config.get_text_config()


def _parts(inner: Any) -> tuple[str, nn.Module, nn.ModuleList]:
    config = _config(inner)
    return config.model_type, inner.base_model, find_blocks(inner.base_model, config.num_hidden_layers)


def _norm(module: Any, family: Family) -> FinalNorm:
    weight = module.weight.detach().float()
    if isinstance(module, nn.LayerNorm):
        return FinalNorm(kind="layer_norm", gain=weight, bias=module.bias.detach().float(), eps=module.eps)
    gain = 1 + weight if family.gain_less_one else weight  # in float32, as the models do
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return FinalNorm(kind="rms_norm", gain=gain, eps=eps)


def _matrix(module: Any) -> Tensor:
    """The weight of a projection as row vectors need it; gpt2's Conv1D keeps it that way round."""
    weight: Tensor = module.weight.detach().float()
    return weight.T if isinstance(module, nn.Linear) else weight
