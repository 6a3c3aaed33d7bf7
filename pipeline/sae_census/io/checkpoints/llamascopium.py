"""Folders of llamascopium and of lm_saes before it: `config.json` with `sae_type` and `sae_weights.safetensors`.

pre = s x W_E + b_E, nothing subtracted first, with s = sqrt(D) / the average norm of activations, which stands among
the tensors. Where `sparsity_include_decoder_norm` says so, the gate sees pre times the length of the feature's decoder
row; the code is pre all the same, as upstream reports it, in units of scaled activations. Only a TopK of that kind is
reported times that length (decoder rows of length 1), for its choice and its codes to be on one scale.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_census.compute.numbers.sae import Gate, JumpRelu, Relu, SparseAutoencoder, TopK
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, json_object, matrix, positive, tensor, whole_number
from sae_census.io.checkpoints.stated import Stated

CONFIG, WEIGHTS = "config.json", ("sae_weights.safetensors",)
FILES = (CONFIG, *WEIGHTS)
_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a folder.

    Raises:
        CheckpointError: if a key or tensor is missing, or the SAE is of a kind that is not supported.
    """
    path = weights.parent / CONFIG
    config = json_object(path)
    point, norm = config.get("hook_point_in"), config.get("norm_activation")
    odd = ["use_glu_encoder"] if config.get("use_glu_encoder") else []
    if config.get("sae_type", "sae") != "sae":
        odd.append(f"sae_type {config['sae_type']!r}")
    if point != config.get("hook_point_out"):
        odd.append("another hook_point_out than hook_point_in")
    if norm not in ("dataset-wise", "token-wise", "inference"):
        odd.append(f"norm_activation {norm!r}")
    if odd:
        raise CheckpointError(f"{path} has {', '.join(odd)}, which is not supported")
    w_enc, b_enc, w_dec, b_dec = _weights(weights, tensors, config)
    lengths = w_dec.norm(dim=1) if config.get("sparsity_include_decoder_norm", True) else torch.ones(len(w_dec))
    _check_stated(path, str(norm), stated)
    scale: float = 1.0
    overrides: dict[str, float] = {}
    if norm == "dataset-wise":
        scale, overrides = _scale(weights, tensors, f"dataset_average_activation_norm.{point}", len(w_enc), stated)
        w_enc, w_dec, b_dec = w_enc * scale, w_dec / scale, b_dec / scale
    gate = _gate(weights, config, tensors, lengths)
    if isinstance(gate, TopK):
        lengths = torch.where(lengths > 0, lengths, 1)
        w_enc, b_enc, w_dec = w_enc * lengths, b_enc * lengths, w_dec / lengths[:, None]
    sae = SparseAutoencoder(
        w_enc=w_enc,
        b_enc=b_enc,
        w_dec=w_dec,
        b_dec=b_dec,
        gate=gate,
        transform="constant_norm_rescale" if norm == "token-wise" else "none",
        scale=scale,
        decoder_norm=isinstance(gate, TopK) and bool(config.get("sparsity_include_decoder_norm", True)),
    )
    return sae, {"hook_name": point} | ({"overrides": overrides} if overrides else {})


def _check_stated(path: Path, norm: str, stated: Stated) -> None:
    own = {"dataset-wise": "expected_average_only_in", "token-wise": "constant_norm_rescale"}.get(norm, "none")
    factor = stated.norm_scaling_factor is not None and norm != "dataset-wise"
    if stated.normalize_activations not in (None, own) or factor:
        raise CheckpointError(
            f"{path} says norm_activation {norm!r}, which is saes[].normalize_activations={own}; leave out what is "
            "stated of it"
        )


def _scale(
    weights: Path, tensors: Mapping[str, Tensor], name: str, width: int, stated: Stated
) -> tuple[float, dict[str, float]]:
    """The factor of activations, and what of it no file says; of Llama-Scope-R1-Distill only SAELens' list does."""
    given = stated.norm_scaling_factor
    if name not in tensors and given is not None:
        return given, {"norm_scaling_factor": given}
    if name not in tensors:
        raise CheckpointError(
            f"{weights} has no tensor {name!r}, and its SAE expects activations times sqrt(D) / that average norm; "
            "give the factor as saes[].norm_scaling_factor"
        )
    own = math.sqrt(width) / positive(weights, tensor(weights, tensors, name).item(), name)
    if given is not None and not math.isclose(given, own, rel_tol=1e-6):
        raise CheckpointError(f"saes[].norm_scaling_factor is {given}, but {weights} says {own}; leave it out")
    return own, {}


def _weights(
    weights: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if "encoder.weight" in tensors:  # lm_saes in 2025
        encoder, decoder = (matrix(weights, tensors, f"{side}.weight") for side in ("encoder", "decoder"))
        w_enc, w_dec, biases = encoder.T.contiguous(), decoder.T.contiguous(), ("encoder.bias", "decoder.bias")
    else:
        w_enc, w_dec = matrix(weights, tensors, "W_E"), matrix(weights, tensors, "W_D")
        biases = ("b_E", "b_D")
    b_enc, b_dec = tensor(weights, tensors, biases[0]), torch.zeros(len(w_enc))
    if config.get("use_decoder_bias", True):
        b_dec = tensor(weights, tensors, biases[1])
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    return w_enc, b_enc, w_dec, b_dec


def _gate(weights: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], lengths: Tensor) -> Gate:
    path = weights.parent / CONFIG
    match config.get("act_fn"):
        case "relu":
            return Relu()
        case "topk":
            return TopK(whole_number(path, config.get("top_k"), "top_k"))
        case "jumprelu":
            name = next((name for name in _THRESHOLDS if name in tensors), _THRESHOLDS[0])
            threshold = tensor(weights, tensors, name, len(lengths)).exp() / lengths
            return JumpRelu(threshold.clamp(max=torch.finfo(torch.float32).max))  # a row of length 0 never fires
        case other:
            raise CheckpointError(f"{path} gives act_fn as {other!r}; expected relu, jumprelu or topk")
