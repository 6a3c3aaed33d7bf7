"""SAELens directories: `cfg.json` and `sae_weights.safetensors`, layouts before and after version 6.

Before 6 the metadata keys stood at the top level and some had other names. What cannot be reproduced exactly
(an activation scale that the directory does not hold, a transcoder, a finetuned scaling factor) is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from pipeline.compute.sae import Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK, Transform
from pipeline.errors import CheckpointError

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_ARCHITECTURES = ("standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk", "gated")


def detect(path: Path) -> bool:
    """Whether a directory is laid out like this."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, tensors: Mapping[str, Tensor]) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a directory and its metadata (`hook_name`, `prepend_bos`, …, possibly empty).

    Args:
        path: the directory.
        tensors: the tensors of its weights file, float32.

    Raises:
        CheckpointError: if a key or tensor is missing, or the SAE is of a kind that is not supported.
    """
    config = _modern(json.loads((path / CONFIG).read_text()))
    architecture = config["architecture"]
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported; expected one of {', '.join(_ARCHITECTURES)}"
        )
    if not torch.all(tensors.get("scaling_factor", torch.ones(1)) == 1):
        raise CheckpointError(f"{path} holds a finetuned scaling_factor, which SAELens no longer defines")
    transform = config.get("normalize_activations") or "none"
    w_enc, b_enc, w_dec, b_dec = _weights(path, architecture, tensors)
    if transform == "expected_average_only_in":
        scale = _activation_scale(path)
        w_enc, w_dec, b_dec, transform = w_enc * scale, w_dec / scale, b_dec / scale, "none"
    if transform not in get_args(Transform):
        raise CheckpointError(f"{path}: normalize_activations {transform!r} is not supported")
    gate = _gate(path, architecture, config, tensors)
    if isinstance(gate, TopK) and config.get("rescale_acts_by_decoder_norm"):
        norms = w_dec.norm(dim=1)  # codes are selected and reported times the norm, decoded without it
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    sae = SparseAutoencoder(
        w_enc=w_enc.contiguous(),
        b_enc=b_enc,
        w_dec=w_dec.contiguous(),
        b_dec=b_dec,
        gate=gate,
        pre_bias=b_dec if config.get("apply_b_dec_to_input") else None,
        transform=cast(Transform, transform),
    )
    return sae, config["metadata"]


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the layout of version 6: architecture keys on top, the rest under `metadata`."""
    if "metadata" in config:
        return config
    config = dict(config)
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    for old, new in renamed.items():
        if old in config:
            config.setdefault(new, config.pop(old))
    config.setdefault("architecture", "standard")
    config.setdefault("apply_b_dec_to_input", True)
    config.setdefault("prepend_bos", True)
    if config.get("activation_fn") == "topk":
        config["architecture"] = "topk"
        config.setdefault("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    elif config.get("activation_fn", "relu") != "relu":
        raise CheckpointError(f"cfg.json names activation_fn {config['activation_fn']!r}; expected relu or topk")
    if isinstance(config.get("normalize_activations"), bool):
        scaled = config["normalize_activations"]
        config["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    metadata = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path")
    return config | {"metadata": {key: config[key] for key in metadata if key in config}}


def _tensor(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{path / WEIGHTS} has no tensor {name!r}; it has {', '.join(sorted(tensors))}")
    return tensors[name]


def _weights(path: Path, architecture: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w_enc, w_dec, b_dec = (_tensor(path, tensors, name) for name in ("W_enc", "W_dec", "b_dec"))
    b_enc = torch.zeros(w_enc.shape[-1]) if architecture == "gated" else _tensor(path, tensors, "b_enc")
    expected = (w_enc.shape[0], w_enc.shape[-1])
    if w_enc.ndim != 2 or w_dec.shape != expected[::-1] or b_enc.shape != expected[1:] or len(b_dec) != expected[0]:
        raise CheckpointError(
            f"{path / WEIGHTS}: W_enc {tuple(w_enc.shape)}, b_enc {tuple(b_enc.shape)}, W_dec {tuple(w_dec.shape)}, "
            f"b_dec {tuple(b_dec.shape)} do not fit; expected (D, F), (F,), (F, D), (D,)"
        )
    return w_enc, b_enc, w_dec, b_dec


def _gate(path: Path, architecture: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
    num_features = tensors["W_enc"].shape[1]
    match architecture:
        case "standard":
            return Relu()
        case "topk":
            if not isinstance(config.get("k"), int) or config["k"] < 1:
                raise CheckpointError(f"{path / CONFIG} is of a topk SAE but gives k as {config.get('k')!r}")
            return TopK(config["k"])
        case "gated":
            b_gate, b_mag, r_mag = (_tensor(path, tensors, name) for name in ("b_gate", "b_mag", "r_mag"))
            return Gated(b_gate, b_mag, r_mag)
        case _:
            if "log_threshold" in tensors:
                threshold = tensors["log_threshold"].exp()
            elif "topk_threshold" in tensors:
                threshold = tensors["topk_threshold"]
            else:
                threshold = _tensor(path, tensors, "threshold")
            threshold = threshold.expand(num_features).contiguous()
            if bool((threshold < 0).any()):
                raise CheckpointError(f"{path}: a threshold is below 0; was the SAE trained to the end?")
            return JumpRelu(threshold)


def _activation_scale(path: Path) -> float:
    file = path / "activation_scaler.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} expects activations scaled by a factor that it does not hold "
            "(normalize_activations: expected_average_only_in); put it into activation_scaler.json as "
            '{"scaling_factor": …} or fold it into the weights'
        )
    return float(json.loads(file.read_text())["scaling_factor"])
