"""Gemma Scope 2 folders (Gemma 3): `<site>/layer_<L>_width_<W>_l0_<size>/params.safetensors`, usually with a config.

pre = x w_enc + b_enc with w_enc (D, F), nothing subtracted first; a code is pre where pre > threshold; z w_dec +
b_dec. The config names modules, `model.layers.12.output`; without one, only the site resid_post is told from the
folders. Transcoders and affine connections are refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_census.compute.numbers.sae import JumpRelu, SparseAutoencoder
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, json_object, matrix, tensor
from sae_census.io.checkpoints.stated import Stated

CONFIG, WEIGHTS = "config.json", ("params.safetensors",)
FILES = (CONFIG, *WEIGHTS)
_AFFINE = "affine_skip_connection"
_SITES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return (folder / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a folder; its hook point where the config, or else the path, names one.

    Raises:
        CheckpointError: if a tensor is missing, or the SAE is of a kind that is not supported.
    """
    folder = weights.parent
    config = json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    entry = config.get("hf_hook_point_in")
    other = config.get("hf_hook_point_out", entry) != entry or folder.absolute().parent.name.startswith("transcoder")
    if other or _AFFINE in tensors or config.get("architecture", "jump_relu") != "jump_relu":
        raise CheckpointError(
            f"{folder} is a transcoder, is affine or has another gate than a JumpReLU, which is not supported"
        )
    w_enc, w_dec = matrix(weights, tensors, "w_enc"), matrix(weights, tensors, "w_dec")
    b_enc, b_dec = tensor(weights, tensors, "b_enc"), tensor(weights, tensors, "b_dec")
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    gate = JumpRelu(tensor(weights, tensors, "threshold", w_enc.shape[1]))
    sae = SparseAutoencoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, gate=gate)
    about = {"hook_name": _hook_name(folder, entry), "model_name": config.get("model_name")}
    return sae, about | {"prepend_bos": True, "context_size": 1024}


def _hook_name(folder: Path, module: str | None) -> str | None:
    if module is None:
        layer = re.match(r"layer_(\d+)_", folder.absolute().name)
        is_residual = folder.absolute().parent.name in ("resid_post", "resid_post_all")
        return f"blocks.{layer[1]}.hook_resid_post" if layer and is_residual else None
    block = re.fullmatch(r"(?:.+\.)?layers\.(\d+)\.(.+)", module)
    return f"blocks.{block[1]}.{_SITES[block[2]]}" if block and block[2] in _SITES else None
