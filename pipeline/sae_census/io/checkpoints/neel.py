"""Neel Nanda's layout: `<version>.pt` beside `<version>_cfg.json`, several versions in a folder.

pre = (x - b_dec) W_enc + b_enc, ReLU, matrices for row vectors. The first releases read the activations of a
one-layer model's MLP and say only how wide it is (`d_mlp`); later ones name the hook point (`act_name`, `act_size`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_census.compute.numbers.sae import Relu, SparseAutoencoder
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import json_object
from sae_census.io.checkpoints.stated import Stated

WEIGHTS = ("*.pt",)
FILES = WEIGHTS
"""What decides an SAE: all that its config adds is the hook point, which is part of every key."""
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def detect(path: Path) -> bool:
    """Whether a directory is laid out like this."""
    return any(_config_of(weights).is_file() for weights in path.glob(WEIGHTS[0]))


def read(weights: Path, tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of one version, and its config with a `hook_name`.

    Raises:
        CheckpointError: if a tensor is missing, or the config is missing or says another width.
    """
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise CheckpointError(f"{weights} has no tensor {missing[0]!r}; it has {', '.join(sorted(tensors))}")
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in _TENSORS)
    width, num_features = w_enc.shape if w_enc.ndim == 2 else (-1, -1)
    if (w_dec.shape, b_enc.shape, b_dec.shape) != ((num_features, width), (num_features,), (width,)):
        raise CheckpointError(
            f"{weights}: W_enc {tuple(w_enc.shape)}, b_enc {tuple(b_enc.shape)}, W_dec {tuple(w_dec.shape)}, "
            f"b_dec {tuple(b_dec.shape)} do not fit; expected (D, F), (F,), (F, D), (D,)"
        )
    path = _config_of(weights)
    if not path.is_file():
        raise CheckpointError(f"{weights} has no config beside it; expected {path.name}")
    config = json_object(path)
    said = config.get("act_size", config.get("d_mlp"))
    if said != width:
        raise CheckpointError(f"{path} is of activations {said} wide, but W_enc takes {width}")
    hook_name = config.get("act_name") or f"blocks.{config.get('layer', 0)}.mlp.hook_post"
    sae = SparseAutoencoder(
        w_enc=w_enc.contiguous(), b_enc=b_enc, w_dec=w_dec.contiguous(), b_dec=b_dec, gate=Relu(), pre_bias=b_dec
    )
    trained = {"context_size": config["seq_len"]} if isinstance(config.get("seq_len"), int) else {}
    if hook_name.endswith("hook_z"):
        trained |= {"prepend_bos": True}  # no config of the release says it; SAELens does
    return sae, config | {"hook_name": hook_name} | trained


def _config_of(weights: Path) -> Path:
    return weights.with_name(f"{weights.stem}_cfg.json")
