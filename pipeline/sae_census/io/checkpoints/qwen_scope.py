"""Qwen-Scope folders: a torch file `layer<n>.sae.pt` for each layer, and no config.

pre = W_enc x + b_enc with W_enc (F, D), nothing subtracted first; the k largest are codes as they are, without a
ReLU; the reconstruction is W_dec z + b_dec with W_dec (D, F). k stands in the repository's name alone,
`SAE-Res-<model>-W<width>K-L0_<k>`, so a file taken out of its folder needs the user's word.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_census.compute.numbers.sae import SparseAutoencoder, TopK
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, matrix, tensor
from sae_census.io.checkpoints.stated import Stated

WEIGHTS = ("layer{layer}.sae.pt",)
FILES = WEIGHTS
_LAYER = re.compile(r"layer(\d+)\.sae\.pt")
_NAMED_MODEL = re.compile(r"SAE-Res-(.+)-W\d+K-L0_\d+")
_NAMED_K = re.compile(r"L0_(\d+)")


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return any(_LAYER.fullmatch(file.name) for file in folder.glob("layer*.sae.pt"))


def read(weights: Path, tensors: Mapping[str, Tensor], stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of one layer; its hook point is that layer's resid_post.

    Raises:
        CheckpointError: if a tensor is missing, or neither the folder nor the user says k.
    """
    w_enc, w_dec = (matrix(weights, tensors, name).T.contiguous() for name in ("W_enc", "W_dec"))
    b_enc, b_dec = (tensor(weights, tensors, name) for name in ("b_enc", "b_dec"))
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    named = next((int(found[1]) for part in reversed(weights.parts) if (found := _NAMED_K.search(part))), None)
    if (chosen := named or stated.k) is None:
        raise CheckpointError(
            f"no folder of {weights} is called …L0_<k>, so nothing says how many codes a token has; give saes[].k"
        )
    gate = TopK(chosen, postact="identity")
    sae = SparseAutoencoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, gate=gate)
    layer = _LAYER.fullmatch(weights.name)
    about = {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}
    model = next((found for part in reversed(weights.parts) if (found := _NAMED_MODEL.search(part))), None)
    return sae, about | ({"model_name": model[1]} if model else {})
