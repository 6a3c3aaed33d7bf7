"""SAELens directories: `cfg.json` and `sae_weights.safetensors`, layouts before and after version 6.

Before 6 the metadata keys stood at the top level and some had other names. Settings that only the library's list of
releases has come from `releases` where the path names the repository, else from the user. What cannot be reproduced
exactly (an activation scale that nobody says, a transcoder, a finetuned scaling factor) is refused.

What is written is of version 6 and needs no folding: SAELens encodes raw activations with it. The unit of codes that
are not of raw activations stands in the metadata, where SAELens passes over it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from sae_census.compute.numbers.sae import Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK, Transform
from sae_census.errors import ArgumentError, CheckpointError, ConfigError
from sae_census.io.checkpoints import releases
from sae_census.io.checkpoints.files import (
    SUFFIXES,
    check_config,
    check_shapes,
    json_object,
    positive,
    tensor,
    write_safetensors,
)
from sae_census.io.checkpoints.releases import Release
from sae_census.io.checkpoints.stated import Stated
from sae_census.types import HookPoint

WEIGHTS, CONFIG, SCALE = ("sae_weights.safetensors",), "cfg.json", "activation_scaler.json"
FILES = (CONFIG, *WEIGHTS, SCALE)
_ARCHITECTURES = ("standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk", "gated")
_BY_NORM = ("topk", "batchtopk", "matryoshka_batchtopk")
"""Architectures that may treat their decoder as if its rows had length 1."""
_LAYOUT = "6.0.0"
"""The first version of SAELens that has the layout which is written; without one it takes a config for an older."""
_UNIT_SCALE, _UNIT_NORM = "codes_scale", "codes_times_decoder_norm"
"""Metadata of SAEs that were written here: what was folded into weights, which decides the unit of codes."""
_FOLDED = ("overrides", "sae_lens_release", "looks_like_centred_release", "hook_point", "hook_name", "sae_lens_version")
"""Keys of metadata that are not true of the written folder any more, or are written anew."""


def detect(path: Path) -> bool:
    """Whether a directory is laid out like this."""
    return (path / CONFIG).is_file() and (path / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
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
    w_enc, b_enc, w_dec, b_dec = _weights(weights, architecture, tensors)
    metadata, normalization = _known(path, config, w_enc.shape[1], stated)
    transform, scale = normalization
    if transform == "expected_average_only_in":
        w_enc, w_dec, b_dec, transform = w_enc * scale, w_dec / scale, b_dec / scale, "none"
    if transform not in get_args(Transform):
        raise CheckpointError(f"{path}: normalize_activations {transform!r} is not supported")
    gate = _gate(weights, architecture, config, tensors)
    by_norm = bool(architecture in _BY_NORM and config.get("rescale_acts_by_decoder_norm"))
    if by_norm:
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
        # the rows that lengths were taken of had the scale divided out
        scale=(1.0 if by_norm else scale) * positive(path / CONFIG, metadata.get(_UNIT_SCALE, 1.0), _UNIT_SCALE),
        decoder_norm=by_norm or metadata.get(_UNIT_NORM) is True,
    )
    return sae, metadata


def write(folder: Path, sae: SparseAutoencoder, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, which SAELens loads with equal codes and reconstructions.

    Args:
        folder: is made; its config and weights are replaced.
        sae: whose codes are never negative, and whose gate reads what its encoder reads.
        config: JSON values; `hook_point`, or `hook_name`, is required. What it says of sizes and architecture must be
            right; the rest becomes metadata.
        metadata: JSON values.

    Raises:
        ArgumentError: if the layout cannot hold this SAE, or the config contradicts it.
    """
    if folder.suffix in SUFFIXES or folder.is_file():
        raise ArgumentError(f"save_path is {folder}; expected a directory, for {CONFIG} and {WEIGHTS[0]}")
    facts, tensors = _written(sae)
    check_config(config, facts)
    named = config.get("hook_point") or config.get("hook_name")
    if named is None:
        raise ArgumentError("config cannot be saved: it has no hook_point")
    try:
        hook_point = HookPoint.parse(str(named))
        about = {key: value for key, value in config.items() if key not in (*facts, *_FOLDED)} | dict(metadata)
        about |= {"hook_name": str(hook_point), "sae_lens_version": _LAYOUT}
        about |= {_UNIT_SCALE: sae.scale} if sae.scale != 1 else {}
        about |= {_UNIT_NORM: True} if sae.decoder_norm else {}
        shape = {"reshape_activations": "hook_z" if hook_point.stream == "attn_z" else "none"}
        whole = facts | shape | {"dtype": "float32", "device": "cpu", "metadata": about}
        body = json.dumps(whole, indent=2, allow_nan=False)
    except (ConfigError, TypeError, ValueError) as error:
        raise ArgumentError(f"config cannot be saved: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS[0], tensors)
    (folder / CONFIG).write_text(body + "\n", encoding="utf-8")


def _written(sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the config must say of an SAE, and its tensors."""
    facts: dict[str, Any] = {"d_in": sae.width, "d_sae": sae.num_features, "normalize_activations": sae.transform}
    shared = sae.pre_bias is not None and torch.equal(sae.pre_bias, sae.b_dec)
    facts |= {"apply_b_dec_to_input": shared}
    shift = torch.zeros_like(sae.b_enc) if shared or sae.pre_bias is None else sae.pre_bias @ sae.w_enc
    tensors = {"W_enc": sae.w_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    if sae.is_signed:
        raise ArgumentError(
            f"the {type(sae.gate).__name__} gate of the SAE lets negative codes through (postact identity), which "
            "SAELens cannot say: its gates end in a ReLU"
        )
    match sae.gate:
        case Relu():
            return facts | {"architecture": "standard"}, tensors | {"b_enc": sae.b_enc - shift}
        case TopK(k):
            facts |= {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}
            return facts, tensors | {"b_enc": sae.b_enc - shift}
        case JumpRelu(threshold):
            return facts | {"architecture": "jumprelu"}, tensors | {"b_enc": sae.b_enc - shift, "threshold": threshold}
        case Gated(b_gate, b_mag, r_mag, None, _):
            biases = {"b_gate": b_gate - shift, "b_mag": b_mag - shift * r_mag.exp(), "r_mag": r_mag}
            return facts | {"architecture": "gated"}, tensors | biases
        case _:
            raise ArgumentError("the gate of the SAE has a matrix of its own (W_gate), which SAELens cannot say")


def _known(
    path: Path, config: dict[str, Any], num_features: int, stated: Stated
) -> tuple[dict[str, Any], tuple[str, float]]:
    """The metadata with all that is known beside it, and how activations are normalised, with the factor if it is one.

    The user's word comes before the list of releases, that before the folder. What differs from the folder stands in
    the metadata under `overrides`.
    """
    metadata = dict(config["metadata"])
    release = releases.by_path(path, str(metadata.get("hook_name")))
    like = releases.alike(path, metadata, num_features) if release is None and config["is_old"] else None
    own = config.get("normalize_activations") or "none"
    how = stated.normalize_activations or (release and release.normalize_activations) or own
    if like and like.normalize_activations and stated.normalize_activations is None and own == "none":
        raise CheckpointError(
            f"{path} looks like the release {like.name}, whose SAEs expect normalize_activations "
            f"{like.normalize_activations}, which only SAELens' list of releases says; give "
            f"saes[].normalize_activations={like.normalize_activations}, or none if this is another SAE"
        )
    scale, overrides = 1.0, {} if how == own else {"normalize_activations": how}
    if how == "expected_average_only_in":
        scale, is_own = _activation_scale(path, metadata, release or like, stated, is_certain=release is not None)
        overrides |= {} if is_own else {"norm_scaling_factor": scale}
    elif stated.norm_scaling_factor is not None:
        raise CheckpointError(
            f"saes[].norm_scaling_factor is given, but {path} says normalize_activations {how}; say "
            "saes[].normalize_activations=expected_average_only_in if that is wrong"
        )
    if release:
        metadata["sae_lens_release"] = release.name
        if release.center_writing_weights:
            kwargs = metadata.get("model_from_pretrained_kwargs") or {}
            metadata["model_from_pretrained_kwargs"] = kwargs | {"center_writing_weights": True}
    elif like and like.center_writing_weights and not metadata.get("model_from_pretrained_kwargs"):
        metadata["looks_like_centred_release"] = like.name
    return metadata | ({"overrides": overrides} if overrides else {}), (how, scale)


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the layout of version 6: architecture keys on top, the rest under `metadata`."""
    if isinstance(config.get("metadata"), dict):
        about = {"dtype": config.get("dtype")} | config["metadata"]
        return config | {"metadata": about, "is_old": False}
    config = config | {"is_old": True}
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
        "model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "model_from_pretrained_kwargs",
        "exclude_special_tokens", "seqpos_slice", "dataset_path", "dtype",
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


def _activation_scale(
    path: Path, metadata: Mapping[str, Any], release: Release | None, stated: Stated, *, is_certain: bool
) -> tuple[float, bool]:
    """The factor of activations, and whether the folder holds it."""
    file = path / SCALE
    if file.is_file():
        own = positive(file, json_object(file).get("scaling_factor"), "scaling_factor")
        if stated.norm_scaling_factor not in (None, own):
            raise CheckpointError(f"saes[].norm_scaling_factor is {stated.norm_scaling_factor}, but {file} says {own}")
        return own, True
    listed = release.norm_scaling_factors.get(str(metadata.get("hook_name"))) if release else None
    if stated.norm_scaling_factor is not None:
        return stated.norm_scaling_factor, False
    if listed is not None and is_certain:
        return listed, False
    hint = f" (of {release.name} it is {listed})" if release and listed is not None else ""
    raise CheckpointError(
        f"{path} expects activations scaled by a factor that it does not hold "
        f"(normalize_activations: expected_average_only_in); give it as saes[].norm_scaling_factor{hint} or in {SCALE} "
        'as {"scaling_factor": …}, or say saes[].normalize_activations=none if it is folded into the weights'
    )
