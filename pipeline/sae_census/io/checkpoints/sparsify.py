"""EleutherAI sparsify folders: `<hook point>/cfg.json` and `<hook point>/sae.safetensors`.

pre = (x - b_dec) E^T + b with `encoder.weight` E (F, D); the k largest, through a ReLU; z W_dec + b_dec with W_dec
(F, D). The hook point is the folder's name, a module's path below the base model; what is read is its output.
Transcoders, skip connections, groupmax, signed codes and matching pursuit are refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_census.compute.numbers.sae import SparseAutoencoder, TopK
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints.files import check_shapes, json_object, matrix, tensor, whole_number
from sae_census.io.checkpoints.stated import Stated

CONFIG, WEIGHTS = "cfg.json", ("sae.safetensors",)
FILES = (CONFIG, *WEIGHTS)
_REFUSED = ("transcode", "skip_connection", "signed", "matching_pursuit", "slice_encoder", "jumprelu")
_MODULE = re.compile(r"(?:layers|h)\.(\d+)(?:\.(\w+))?")
_STREAMS = {"mlp": "hook_mlp_out"} | dict.fromkeys(("attn", "self_attn", "attention"), "hook_attn_out")
_EMBEDDINGS = ("embed_tokens", "embed_in")


def detect(folder: Path) -> bool:
    """Whether a folder is laid out like this."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS[0]).is_file()


def read(weights: Path, tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a folder; its hook point as the folder's name, or its parent's above a seed, says.

    Raises:
        CheckpointError: if a key or tensor is missing, or the SAE is of a kind that is not supported.
    """
    folder = weights.parent
    config = json_object(folder / CONFIG)
    odd = [name for name in _REFUSED if config.get(name)]
    if config.get("activation", "topk") != "topk":
        odd.append(f"activation {config['activation']!r}")
    if odd or "W_skip" in tensors:
        raise CheckpointError(
            f"{folder} has {', '.join(odd) or 'W_skip'}, which is not supported; expected a plain TopK"
        )
    w_enc, w_dec = matrix(weights, tensors, "encoder.weight").T.contiguous(), matrix(weights, tensors, "W_dec")
    b_enc, b_dec = tensor(weights, tensors, "encoder.bias"), tensor(weights, tensors, "b_dec")
    check_shapes(weights, w_enc, b_enc, w_dec, b_dec)
    gate = TopK(whole_number(folder / CONFIG, config.get("k"), "k"))
    sae = SparseAutoencoder(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, gate=gate, pre_bias=b_dec)
    run = _run_config(folder)
    about = {"hook_name": _hook_name(folder, str(run.get("model"))), "model_name": run.get("model")}
    excluded = {"exclude_special_tokens": run["exclude_tokens"]} if run.get("exclude_tokens") else {}
    return sae, about | {"context_size": run.get("ctx_len"), "dataset_path": run.get("dataset")} | excluded


def _run_config(folder: Path) -> dict[str, Any]:
    """What the root, one or two folders up, says of the run, if anything."""
    for parent in folder.absolute().parents[:2]:
        if (parent / "config.json").is_file():
            return json_object(parent / "config.json")
    return {}


def _hook_name(folder: Path, model: str) -> str | None:
    """The public name of the module's output; None if the folder is not named after one that has such a name."""
    path = folder.absolute()
    module = path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name
    block = _MODULE.fullmatch(module)
    if block and not block[2]:
        return f"blocks.{block[1]}.hook_resid_post"
    if block is None and module not in _EMBEDDINGS:
        return None
    if "gemma" in model.lower():
        raise CheckpointError(
            f"{folder} reads {module} of {model}, which Gemma norms or scales before the residual stream receives it; "
            "no hook point is that tensor"
        )
    if block is None:
        return "blocks.0.hook_resid_pre"
    return f"blocks.{block[1]}.{_STREAMS[block[2]]}" if block[2] in _STREAMS else None
