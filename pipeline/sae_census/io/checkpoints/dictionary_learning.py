"""saprmarks' dictionary_learning folders: `ae.pt` and `config.json`, the SAEBench suites among them.

| dict_class | subtracted first | code |
|---|---|---|
| AutoEncoder | bias | max(pre, 0), on the scale of unit decoder rows, as its own loader gives it |
| AutoEncoderNew | nothing | max(pre, 0) |
| GatedAutoEncoder | decoder_bias | gated |
| JumpReluAutoEncoder | nothing | pre where pre > threshold |
| AutoEncoderTopK | b_dec | the k largest, through a ReLU; its threshold is not used |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | b_dec | pre where pre > threshold, one for all features |

Weights trained on scaled activations were scaled back when they were saved, so activations enter as they are.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_census.compute.numbers.sae import Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, json_object, matrix, tensor, whole_number
from sae_census.io.checkpoints.stated import Stated

CONFIG, WEIGHTS = "config.json", ("ae.pt",)
FILES = (CONFIG, *WEIGHTS)
_BIAS = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "JumpReluAutoEncoder": "b_dec",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
}
"""What each class calls the decoder's bias."""
_NOT_SUBTRACTED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_RESIDUAL = re.compile(r"resid_post_layer_?(\d+)")


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a folder; its hook point where the config names a block's output or input.

    Raises:
        CheckpointError: if a key or tensor is missing, or the dictionary is of a kind that is not supported.
    """
    config = json_object(weights.parent / CONFIG)
    trainer, buffer = (config.get(key) or {} for key in ("trainer", "buffer"))
    kind = trainer.get("dict_class") or _kind(tensors)
    if kind not in _BIAS:
        raise CheckpointError(f"{weights}: dict_class {kind!r} is not supported; expected one of {', '.join(_BIAS)}")
    b_dec = tensor(weights, tensors, _BIAS[kind])
    if "W_enc" in tensors:
        w_enc, w_dec = matrix(weights, tensors, "W_enc"), matrix(weights, tensors, "W_dec")
        b_enc = tensor(weights, tensors, "b_enc")
    else:
        w_enc = matrix(weights, tensors, "encoder.weight").T.contiguous()
        w_dec = matrix(weights, tensors, "decoder.weight").T.contiguous()
        gated = kind == "GatedAutoEncoder"
        b_enc = torch.zeros(w_enc.shape[1]) if gated else tensor(weights, tensors, "encoder.bias")
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    if kind == "AutoEncoder":
        norms = w_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    sae = SparseAutoencoder(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        gate=_gate(weights, kind, tensors, trainer, w_enc.shape[1]),
        pre_bias=None if kind in _NOT_SUBTRACTED else b_dec,
        decoder_norm=kind == "AutoEncoder",
    )
    about = {"hook_name": _hook_name(trainer, buffer), "model_name": trainer.get("lm_name")}
    return sae, about | {"context_size": buffer.get("ctx_len")}


def _kind(tensors: Mapping[str, Tensor]) -> str | None:
    """The class of an old checkpoint whose config does not name it."""
    marks = {
        "gate_bias": "GatedAutoEncoder",
        "group_sizes": "MatryoshkaBatchTopKSAE",
        "W_enc": "JumpReluAutoEncoder",
        "bias": "AutoEncoder",
        "decoder.bias": "AutoEncoderNew",
    }
    return next((kind for mark, kind in marks.items() if mark in tensors), None)


def _gate(
    weights: Path, kind: str, tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], num_features: int
) -> Gate:
    match kind:
        case "AutoEncoder" | "AutoEncoderNew":
            return Relu()
        case "GatedAutoEncoder":
            names = ("gate_bias", "mag_bias", "r_mag")
            b_gate, b_mag, r_mag = (tensor(weights, tensors, name, num_features) for name in names)
            return Gated(b_gate, b_mag, r_mag)
        case "AutoEncoderTopK":
            k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
            return TopK(whole_number(weights.parent / CONFIG, k, "k"))
    threshold = tensor(weights, tensors, "threshold", num_features)
    if kind != "JumpReluAutoEncoder" and bool((threshold < 0).any()):
        raise CheckpointError(f"{weights}: a threshold is below 0; was the {kind} trained to the end?")
    return JumpRelu(threshold)


def _hook_name(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> str | None:
    block = _RESIDUAL.fullmatch(str(trainer.get("submodule_name")))
    if not block:
        return None
    return f"blocks.{block[1]}.hook_resid_{'pre' if buffer.get('io') == 'in' else 'post'}"
