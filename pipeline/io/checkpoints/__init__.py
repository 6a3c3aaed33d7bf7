"""SAE checkpoints: find the format of a path, read it into canonical form, prove that it is sound.

One module per format family, each with `detect` and `read`; `FORMATS` lists them. The door to safetensors
and huggingface_hub.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline.compute.sae import SparseAutoencoder
from pipeline.errors import CheckpointError
from pipeline.io import embedded
from pipeline.io.checkpoints import neel, sae_lens
from pipeline.types import HookPoint

FORMATS: dict[str, ModuleType] = {"sae_lens": sae_lens, "neel": neel}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSae:
    """An SAE with where it belongs."""

    name: str
    """Unique in a run; part of every feature's key."""
    hook_point: HookPoint
    sae: SparseAutoencoder
    digest: str
    """sha256 over the checkpoint's config and weights."""
    metadata: dict[str, Any]
    """What the checkpoint says about its training."""


def load_sae(
    path: str,
    *,
    hook_point: str | None = None,
    format_name: str | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> LoadedSae:
    """Read the SAE at a local path, a hub id (`org/repo/sub/folder`) or an `embedded:` name.

    Args:
        path: where it lies.
        hook_point: overrides what the checkpoint's metadata says.
        format_name: a key of `FORMATS`; detected if None.
        name: defaults to the last part of the path.
        revision: of a hub repository.

    Raises:
        CheckpointError: if nothing readable lies there.
        ConfigError: if the hook point is not known.
    """
    folder = _locate(path, revision)
    reader = _reader(folder, format_name)
    weights = _weights(folder, reader, Path(path).name)
    sae, metadata = _guarded(folder, lambda: reader.read(weights, _tensors(weights)))
    _check_finite(folder, sae)
    where = hook_point or metadata.get("hook_name")
    if not where:
        raise CheckpointError(f"SAE {path} does not say where it belongs; give saes[].hook_point=blocks.<layer>.…")
    digest = hashlib.sha256()
    for name_of_file in reader.FILES:
        part = weights if name_of_file == reader.WEIGHTS else folder / name_of_file
        if part.is_file():
            with part.open("rb") as file:
                digest.update(part.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return LoadedSae(
        name=name or folder.name,
        hook_point=HookPoint.parse(where),
        sae=sae,
        digest=digest.hexdigest(),
        metadata=metadata,
    )


def is_sae(folder: Path) -> bool:
    """Whether a directory is laid out as a checkpoint of a known format."""
    return any(module.detect(folder) for module in FORMATS.values())


def _locate(path: str, revision: str | None) -> Path:
    if path.startswith(embedded.PREFIX):
        return embedded.sae_path(path)
    folder = Path(path).expanduser()
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        return folder
    parts = path.split("/")
    if folder.is_absolute() or path.startswith((".", "~")) or len(parts) < 2:
        raise CheckpointError(f"SAE path {path} does not exist; expected a directory or a hub id org/repo[/folder]")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, inner = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        root = snapshot_download(repo, revision=revision, allow_patterns=f"{inner}/*" if inner else None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"SAE {path} is neither a local directory nor reachable on the hub: {error}") from error
    return Path(root) / inner


def _reader(folder: Path, format_name: str | None) -> ModuleType:
    if format_name is not None:
        if format_name not in FORMATS:
            raise CheckpointError(f"SAE format {format_name!r} is not known; expected one of {', '.join(FORMATS)}")
        if not FORMATS[format_name].detect(folder):
            raise CheckpointError(f"{folder} is not laid out as {format_name}; it has {_listing(folder)}")
        return FORMATS[format_name]
    found = [module for module in FORMATS.values() if module.detect(folder)]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} is not an SAE checkpoint of a known format ({', '.join(FORMATS)}); it has "
            f"{_listing(folder)}; expected for example cfg.json and sae_weights.safetensors"
        )
    return found[0]


def _listing(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "no files"


def _weights(folder: Path, reader: ModuleType, named: str) -> Path:
    """The weights file: the one that the path named, or the only one."""
    found = sorted(folder.glob(reader.WEIGHTS))
    chosen = [file for file in found if file.name == named] or found
    if len(chosen) != 1:
        raise CheckpointError(f"{folder} holds {', '.join(file.name for file in found)}; give the path of one of them")
    return chosen[0]


def _tensors(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".pt":
        try:
            found = dict(torch.load(path, map_location="cpu", weights_only=True))
        except (UnpicklingError, RuntimeError, EOFError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a torch file of plain tensors, and no pickle is loaded") from error
    else:
        from safetensors.torch import load_file

        found = load_file(path)
    return {name: tensor.float() for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _guarded(
    folder: Path, read: Callable[[], tuple[SparseAutoencoder, dict[str, Any]]]
) -> tuple[SparseAutoencoder, dict[str, Any]]:
    from safetensors import SafetensorError

    try:
        return read()
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {folder} are not a sound safetensors file: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the config in {folder} is not JSON: {error}") from error


def _check_finite(folder: Path, sae: SparseAutoencoder) -> None:
    holders = ((sae, ("w_enc", "b_enc", "w_dec", "b_dec")), (sae.gate, ("threshold", "b_gate", "b_mag", "r_mag")))
    for holder, names in holders:
        for name in names:
            values = getattr(holder, name, None)
            if values is not None and not torch.isfinite(values).all():
                raise CheckpointError(f"the SAE in {folder} has NaN or infinite values in {name}")
