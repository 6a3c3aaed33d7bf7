"""SAELens directories: `cfg.json` and `sae_weights.safetensors`, layouts before and after version 6.

Before 6 the metadata keys stood at the top level and some had other names. What cannot be reproduced exactly
(an activation scale that the directory does not hold, a transcoder, a finetuned scaling factor) is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from pipeline.compute.sae import Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK, Transform
from pipeline.errors import CheckpointError
from pipeline.io.checkpoints.files import check_shapes, json_object, positive, tensor

WEIGHTS, CONFIG, SCALE = ("sae_weights.safetensors",), "cfg.json", "activation_scaler.json"
FILES = (CONFIG, *WEIGHTS, SCALE)
_ARCHITECTURES = ("standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk", "gated")
_BY_NORM = ("topk", "batchtopk", "matryoshka_batchtopk")
"""Architectures that may treat their decoder as if its rows had length 1."""


def detect(path: Path) -> bool:
    """Whether a directory is laid out like this."""
    return (path / CONFIG).is_file() and (path / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], _k: int | None) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a directory and its metadata (`hook_name`, `prepend_bos`, …, possibly empty).

    Raises:
        CheckpointError: if a key or tensor is missing, or the SAE is of a kind that is not supported.
    """
    path = weights.parent
    config = _modern(json_object(path / CONFIG))
    architecture = config.get("architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported; expected one of {', '.join(_ARCHITECTURES)}"
        )
    if config["metadata"].get("hook_head_index") is not None:
        raise CheckpointError(f"{path} reads one attention head (hook_head_index), which is not supported")
    if not torch.all(tensors.get("scaling_factor", torch.ones(1)) == 1):
        raise CheckpointError(f"{path} holds a finetuned scaling_factor, which SAELens no longer defines")
    transform = config.get("normalize_activations") or "none"
    w_enc, b_enc, w_dec, b_dec = _weights(weights, architecture, tensors)
    scale = 1.0
    if transform == "expected_average_only_in":
        scale = _activation_scale(path)
        w_enc, w_dec, b_dec, transform = w_enc * scale, w_dec / scale, b_dec / scale, "none"
    if transform not in get_args(Transform):
        raise CheckpointError(f"{path}: normalize_activations {transform!r} is not supported")
    gate = _gate(weights, architecture, config, tensors)
    if architecture in _BY_NORM and config.get("rescale_acts_by_decoder_norm"):
        norms = w_dec.norm(dim=1)  # codes are selected and reported times the norm, decoded without it
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
        if isinstance(gate, JumpRelu):  # its threshold is in units of code times norm, which the scale divided
            gate = JumpRelu(gate.threshold / scale)
    sae = SparseAutoencoder(
        w_enc=w_enc.contiguous(),
        b_enc=b_enc,
        w_dec=w_dec.contiguous(),
        b_dec=b_dec,
        gate=gate,
        pre_bias=b_dec if config.get("apply_b_dec_to_input", True) else None,
        transform=cast(Transform, transform),
    )
    return sae, config["metadata"]


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the layout of version 6: architecture keys on top, the rest under `metadata`."""
    if isinstance(config.get("metadata"), dict):
        return config
    config = dict(config)
    renamed = {
        "hook_point": "hook_name",
        "activation_fn_str": "activation_fn",
        "hook_point_head_index": "hook_head_index",
    }
    for old, new in renamed.items():
        if old in config:
            config.setdefault(new, config.pop(old))
    config.setdefault("architecture", "standard")
    config.setdefault("prepend_bos", True)
    if config.get("activation_fn") == "topk":
        config["architecture"] = "topk"
        config.setdefault("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    elif config.get("activation_fn", "relu") != "relu":
        raise CheckpointError(f"cfg.json names activation_fn {config['activation_fn']!r}; expected relu or topk")
    if isinstance(config.get("normalize_activations"), bool):
        scaled = config["normalize_activations"]
        config["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    metadata = (
        "model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "model_from_pretrained_kwargs"
    )  # fmt: skip
    return config | {"metadata": {key: config[key] for key in metadata if key in config}}


def _weights(weights: Path, architecture: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w_enc, w_dec, b_dec = (tensor(weights, tensors, name) for name in ("W_enc", "W_dec", "b_dec"))
    b_enc = torch.zeros(w_enc.shape[-1:]) if architecture == "gated" else tensor(weights, tensors, "b_enc")
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    return w_enc, b_enc, w_dec, b_dec


def _gate(weights: Path, architecture: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
    num_features = tensors["W_enc"].shape[1]
    match architecture:
        case "standard":
            return Relu()
        case "topk":
            if not isinstance(config.get("k"), int) or config["k"] < 1:
                raise CheckpointError(f"{weights.parent / CONFIG} is of a topk SAE but gives k as {config.get('k')!r}")
            return TopK(config["k"])
        case "gated":
            names = ("b_gate", "b_mag", "r_mag")
            b_gate, b_mag, r_mag = (tensor(weights, tensors, name, num_features) for name in names)
            return Gated(b_gate, b_mag, r_mag)
        case _:
            name = next((n for n in ("log_threshold", "topk_threshold") if n in tensors), "threshold")
            threshold = tensor(weights, tensors, name, num_features)
            if name == "log_threshold":
                threshold = threshold.exp()
            if bool((threshold < 0).any()):
                raise CheckpointError(f"{weights}: a threshold is below 0; was the SAE trained to the end?")
            return JumpRelu(threshold)


def _activation_scale(path: Path) -> float:
    file = path / SCALE
    if not file.is_file():
        raise CheckpointError(
            f"{path} expects activations scaled by a factor that it does not hold "
            f"(normalize_activations: expected_average_only_in); put it into {SCALE} as "
            '{"scaling_factor": …} or fold it into the weights'
        )
    return positive(file, json_object(file).get("scaling_factor"), "scaling_factor")
