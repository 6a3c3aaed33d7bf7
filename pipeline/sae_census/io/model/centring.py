"""Centring a model's writing weights, as TransformerLens' `center_writing_weights` does, for SAEs trained that way.

A LayerNorm takes the mean over d_model off whatever it reads, so nothing of a model with LayerNorms depends on what
embeddings, attention and MLPs write along that direction. Their mean is subtracted; predictions stay what they were
up to rounding, and every activation of the residual stream becomes the former one less its mean. An RMSNorm takes
no mean off, so such a model would become another one: it is refused.
"""

import hashlib

import torch
from torch import Tensor, nn

from sae_census.errors import ConfigError
from sae_census.io.model.families import with_layer_norms
from sae_census.io.model.hooks import layout_of


def check_family(family: str) -> None:
    """Raises ConfigError if models of this family cannot be centred."""
    if family not in with_layer_norms():
        raise ConfigError(
            f"model.center_writing_weights is true, but {family} reads its residual stream through norms that take no "
            f"mean off, so centring would change the model; it is for {', '.join(with_layer_norms())}"
        )


def centred_digest(digest: str) -> str:
    """The digest of a model whose weights are centred after they were read from what `digest` is of."""
    return hashlib.sha256(f"{digest} center_writing_weights".encode()).hexdigest()


@torch.no_grad()
def center_writing_weights(model: nn.Module) -> None:
    """Centre a loaded decoder in place: embeddings, output matrices of attention and MLPs, and their biases.

    A head that shares the embedding's matrix keeps the matrix as it was. Logits change by one number a token at most.

    Args:
        model: of transformers, in a family with LayerNorms.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    >>> center_writing_weights(gpt2)
    >>> gpt2.transformer.wte.weight.mean(dim=1).abs().max().item() < 1e-6
    True

    Raises:
        ConfigError: if the model's family has no LayerNorms.
    """
    blocks, taps = layout_of(model)
    config = getattr(model, "config", None)
    check_family(config.get_text_config().model_type if config is not None else type(model).__name__)
    head = getattr(model, "lm_head", None)
    inside = {id(module) for module in blocks.modules()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module) not in inside:
            if head is not None and head.weight is module.weight:
                head.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
            _centre(module.weight, dim=1)
    for block in blocks:
        for stream in ("attn_z", "mlp_post"):
            writer = block.get_submodule(taps[stream].path)
            weight, bias = writer.weight, getattr(writer, "bias", None)
            assert isinstance(weight, Tensor)
            _centre(weight, dim=0 if isinstance(writer, nn.Linear) else 1)  # GPT-2's Conv1D is (in, out)
            if isinstance(bias, Tensor):
                _centre(bias, dim=0)


def is_centred(model: nn.Module) -> bool:
    """Whether the embedding of a model writes nothing along the mean, as after `center_writing_weights`."""
    embedding = next((one for one in model.modules() if isinstance(one, nn.Embedding)), None)
    if embedding is None:
        return False
    weight = embedding.weight[: 1 << 12].float()
    rms = weight.square().mean().sqrt()
    return bool(weight.mean(dim=1).abs().max() < 0.01 * rms)


def _centre(weight: Tensor, dim: int) -> None:
    whole = weight.float()
    weight.copy_(whole - whole.mean(dim=dim, keepdim=True))
