"""The files of a checkpoint: tensors from safetensors, torch and numpy containers, and JSON objects.

The door to safetensors. No pickle is loaded: torch files are read with `weights_only=True`, numpy files with
`allow_pickle=False`, and what that refuses is refused.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from warnings import catch_warnings, simplefilter
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from sae_census.errors import ArgumentError, CheckpointError

SUFFIXES = (".safetensors", ".pt", ".npz")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, float32; entries of other kinds are left out.

    Raises:
        CheckpointError: if the file is damaged, or would have to be unpickled.
    """
    match path.suffix:
        case ".safetensors":
            found = _safetensors(path)
        case ".npz":
            found = _npz(path)
        case _:
            found = read_torch(path)
    return {name: value.detach().float() for name, value in found.items() if isinstance(value, Tensor)}


def read_torch(path: Path) -> dict[str, Any]:
    """The mapping in a torch file.

    Raises:
        CheckpointError: if it holds anything but tensors, numbers, strings and containers of them.
    """
    try:
        with catch_warnings():
            simplefilter("ignore")  # about the pickle's protocol
            value = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain torch file of tensors; pickles that hold code or objects are never loaded, so "
            "convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"the weights in {path} are not a sound torch file: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a mapping of names to tensors")
    return value


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, on whatever device they are, under a temporary name first."""
    from safetensors.torch import save_file

    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_config(config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises ArgumentError if a config that is to be saved contradicts what the SAE itself says."""
    wrong = {key: config[key] for key in facts if config.get(key) not in (None, facts[key])}
    if wrong:
        raise ArgumentError(f"config says {wrong}, but the SAE has { ({key: facts[key] for key in wrong}) }")


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the config in {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def tensor(weights: Path, tensors: Mapping[str, Tensor], name: str, num_features: int | None = None) -> Tensor:
    """A tensor of a checkpoint; with `num_features`, one number for each feature, also where one stands for all.

    Raises:
        CheckpointError: if it is missing or has another shape.
    """
    if name not in tensors:
        raise CheckpointError(f"{weights} has no tensor {name!r}; it has {', '.join(sorted(tensors)) or 'none'}")
    found = tensors[name]
    if num_features is None:
        return found
    if found.numel() == 1:
        return found.reshape(1).expand(num_features).contiguous()
    if found.shape != (num_features,):
        raise CheckpointError(f"{weights}: {name} {tuple(found.shape)} does not fit; expected {(num_features,)}")
    return found


def matrix(weights: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a checkpoint that has two axes.

    Raises:
        CheckpointError: if it is missing or has not.
    """
    found = tensor(weights, tensors, name)
    if found.ndim != 2:
        raise CheckpointError(f"{weights}: {name} {tuple(found.shape)} does not fit; expected two axes")
    return found


def check_shapes(weights: Path, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor) -> None:
    """Raises CheckpointError if these, brought to row vectors, are not of one SAE."""
    width, num_features = w_enc.shape if w_enc.ndim == 2 else (-1, -1)
    if (w_dec.shape, b_enc.shape, b_dec.shape) != ((num_features, width), (num_features,), (width,)):
        raise CheckpointError(
            f"{weights}: W_enc {tuple(w_enc.shape)}, b_enc {tuple(b_enc.shape)}, W_dec {tuple(w_dec.shape)}, "
            f"b_dec {tuple(b_dec.shape)} do not fit; expected (D, F), (F,), (F, D), (D,)"
        )


def whole_number(path: Path, value: Any, name: str) -> int:
    """`value` as a whole number above 0.

    Raises:
        CheckpointError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path} gives {name} as {value!r}; expected a whole number above 0")
    return value


def positive(path: Path, value: Any, name: str) -> float:
    """`value` as a finite number above 0.

    Raises:
        CheckpointError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{path} gives {name} as {value!r}; expected a number above 0")
    return float(value)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {path} are not a sound safetensors file: {error}") from error
    return found


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return {name: torch.from_numpy(array) for name, array in found.items() if array.dtype.kind in "fiu"}
    except (ValueError, TypeError, AttributeError, EOFError, OSError, BadZipFile, UnpicklingError) as error:
        raise CheckpointError(
            f"the weights in {path} are not a sound npz file of numbers (pickled objects are never loaded): "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
