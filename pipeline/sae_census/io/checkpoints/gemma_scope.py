"""Gemma Scope folders (Gemma 2): `layer_<L>/width_<W>/average_l0_<n>/params.npz`.

pre = x W_enc + b_enc with W_enc (D, F), nothing subtracted first; a code is pre where pre > threshold; z W_dec +
b_dec. The layer stands in the folders' names, the site in the repository's: `gemma-scope-2b-pt-res` reads
resid_post, `-mlp` the normed output of the MLP, `-att` the heads side by side. Transcoders, and the SAEs of the
embedding, which expect it unscaled, are refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_census.compute.numbers.sae import JumpRelu, SparseAutoencoder
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, matrix, tensor
from sae_census.io.checkpoints.stated import Stated

WEIGHTS = ("params.npz",)
FILES = WEIGHTS
_REPOSITORY = re.compile(r"(?:^|--)gemma-scope-(\w+-[pi]t)-(res|mlp|att|transcoders)")
_STREAMS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return (folder / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a folder; its hook point where the path says repository and layer.

    Raises:
        CheckpointError: if a tensor is missing, or the SAE is a transcoder or of the embedding.
    """
    parts = weights.absolute().parts[:-1]
    repository = next((found for part in reversed(parts) if (found := _REPOSITORY.search(part))), None)
    if "embedding" in parts or (repository and repository[2] == "transcoders"):
        raise CheckpointError(f"{weights} is of a transcoder or of the embedding, which is not supported")
    named = {f"W_{name[2:]}" if name.startswith("w_") else name: value for name, value in tensors.items()}
    w_enc, w_dec = matrix(weights, named, "W_enc"), matrix(weights, named, "W_dec")
    b_enc, b_dec = tensor(weights, named, "b_enc"), tensor(weights, named, "b_dec")
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    gate = JumpRelu(tensor(weights, named, "threshold", w_enc.shape[1]))
    sae = SparseAutoencoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, gate=gate)
    layer = next((found for part in reversed(parts) if (found := re.fullmatch(r"layer_(\d+)", part))), None)
    trained = {"prepend_bos": True, "context_size": 1024}
    if not (repository and layer):
        return sae, trained
    return sae, trained | {
        "hook_name": f"blocks.{layer[1]}.{_STREAMS[repository[2]]}",
        "model_name": f"gemma-2-{repository[1].removesuffix('-pt')}",
    }
