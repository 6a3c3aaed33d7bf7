"""Llama Scope folders (the LX release): `hyperparams.json` and `checkpoints/final.safetensors`.

The SAE was trained on activations times s = sqrt(D) / their average norm. As upstream does for inference, weights are
folded so that raw activations enter and codes are in raw units with decoder rows of length 1: with n the length of a
feature's decoder column as stored, code = n / s * (s x E^T + b), where that exceeds the one threshold of all
features. Without a threshold, the k largest.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_census.compute.numbers.sae import Gate, JumpRelu, SparseAutoencoder, TopK
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, json_object, matrix, positive, tensor, whole_number
from sae_census.io.checkpoints.stated import Stated

CONFIG, WEIGHTS = "hyperparams.json", ("checkpoints/final.safetensors", "sae_weights.safetensors")
FILES = (CONFIG, WEIGHTS[0])
_REFUSED = ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder")


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def read(weights: Path, tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a folder.

    Raises:
        CheckpointError: if a key or tensor is missing, or the SAE is of a kind that is not supported.
    """
    path = next(parent / CONFIG for parent in weights.parents if (parent / CONFIG).is_file())
    config = json_object(path)
    odd = [name for name in _REFUSED if config.get(name)]
    if config.get("hook_point_in") != config.get("hook_point_out"):
        odd.append("another hook_point_out than hook_point_in")
    if config.get("norm_activation") != "dataset-wise":
        odd.append(f"norm_activation {config.get('norm_activation')!r}")
    if odd:
        raise CheckpointError(f"{path} has {', '.join(odd)}, which is not supported")
    w_enc, w_dec = (matrix(weights, tensors, f"{side}.weight").T.contiguous() for side in ("encoder", "decoder"))
    b_enc, b_dec = tensor(weights, tensors, "encoder.bias"), torch.zeros(len(w_enc))
    if config.get("use_decoder_bias", True):
        b_dec = tensor(weights, tensors, "decoder.bias")
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    norms = config.get("dataset_average_activation_norm") or {}
    scale = math.sqrt(len(w_enc)) / positive(path, norms.get("in"), "dataset_average_activation_norm.in")
    b_enc, b_dec = b_enc / scale, b_dec / scale
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    if by_norm:
        lengths = w_dec.norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, 1)
        w_enc, b_enc, w_dec = w_enc * lengths, b_enc * lengths, w_dec / lengths[:, None]
    gate = _gate(path, config, w_enc.shape[1])
    sae = SparseAutoencoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, gate=gate, decoder_norm=by_norm)
    return sae, {"hook_name": config.get("hook_point_in"), "prepend_bos": True, "context_size": 1024}


def _gate(path: Path, config: Mapping[str, Any], num_features: int) -> Gate:
    kind, threshold = config.get("act_fn"), config.get("jump_relu_threshold") or 0
    if kind == "jumprelu" or (kind == "topk" and threshold > 0):
        return JumpRelu(torch.full((num_features,), positive(path, threshold, "jump_relu_threshold")))
    if kind == "topk":
        return TopK(whole_number(path, config.get("top_k"), "top_k"))
    raise CheckpointError(f"{path} gives act_fn as {kind!r}; expected jumprelu or topk")
