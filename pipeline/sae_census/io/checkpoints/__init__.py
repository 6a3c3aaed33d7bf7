"""SAE checkpoints: find the format of a path, read it into canonical form, prove that it is sound.

One module per format family; `FORMATS` lists them. Each has

- `WEIGHTS`: names its weights file may have, best first; `{layer}` stands for the number of a layer where one
  folder holds a file for each;
- `FILES`: the files that decide an SAE, the weights by the first of their names; its digest is over them;
- `detect(folder)`: whether a folder is laid out like this;
- `read(weights, tensors, stated)`: the SAE and its metadata (`hook_name`, …, possibly empty) from the path of the
  weights, their tensors in float32, and what the user stated, for files that do not say it. What of it changed the
  SAE stands in the metadata under `overrides`, unless a file says it.

The door to huggingface_hub; `files` is the one to safetensors.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sae_census.compute.numbers.sae import CodeUnit, SparseAutoencoder, TopK
from sae_census.errors import CheckpointError
from sae_census.io import embedded
from sae_census.io.checkpoints import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    nanochat,
    neel,
    qwen_scope,
    sae_lens,
    sparsify,
)
from sae_census.io.checkpoints.files import SUFFIXES, read_tensors, read_torch
from sae_census.io.checkpoints.stated import Normalization, Stated
from sae_census.types import HookPoint

FORMATS: dict[str, ModuleType] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "llamascopium": llamascopium,
    "qwen_scope": qwen_scope,
    "neel": neel,
    "nanochat": nanochat,
}
_SAYS_NORMALIZATION = (sae_lens, llamascopium)
"""Formats whose readers see to what the user states of it; `Stated.applied` does for the others."""
_MAX_LAYERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSae:
    """An SAE with where it belongs."""

    name: str
    """Unique in a run; part of every feature's key."""
    hook_point: HookPoint
    sae: SparseAutoencoder
    digest: str
    """sha256 over the checkpoint's config and weights, and over the settings that decide codes and no file says."""
    metadata: dict[str, Any]
    """What the checkpoint says about its training."""

    @property
    def unit(self) -> CodeUnit:
        """What its codes are measured in."""
        return self.sae.unit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a checkpoint lies on this machine."""

    folder: Path
    file: Path | None = None
    """The file that the user named, if any."""
    name: str
    """The last part of what the user wrote that is not a file."""


def load_sae(
    path: str,
    *,
    hook_point: str | None = None,
    format_name: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    k: int | None = None,
    normalize_activations: Normalization | None = None,
    norm_scaling_factor: float | None = None,
) -> LoadedSae:
    """Read the SAE at a local path, a hub id (`org/repo/sub/folder`) or an `embedded:` name.

    Args:
        path: where it lies: a folder, or its weights file.
        hook_point: overrides what the checkpoint's metadata says. Where a folder has a file for each layer, it
            also chooses the file.
        format_name: a key of `FORMATS`; detected if None.
        name: defaults to the last part of the path that is not a file.
        revision: of a hub repository.
        k: of a TopK SAE whose checkpoint does not say it; where it does, both must agree.
        normalize_activations: what the SAE expects to be done to activations, where its folder does not say it.
        norm_scaling_factor: the factor of `expected_average_only_in`, where its folder does not say it; where it
            does, both must agree.

    Returns:
        The SAE in canonical form, float32 on the CPU, with its name, hook point, digest and metadata.

    >>> loaded = load_sae("embedded:resid_post_7")
    >>> str(loaded.hook_point), loaded.sae.width, loaded.sae.num_features
    ('blocks.7.hook_resid_post', 576, 2560)

    Raises:
        CheckpointError: if nothing readable lies there.
        ConfigError: if the hook point is not known.
    """
    chosen = HookPoint.parse(hook_point) if hook_point else None
    place = _locate(path, revision, chosen)
    reader = _reader(place, format_name)
    weights = _weights(place, reader, chosen)
    stated = Stated(k=k, normalize_activations=normalize_activations, norm_scaling_factor=norm_scaling_factor)
    sae, metadata = reader.read(weights, read_tensors(weights), stated)
    if reader not in _SAYS_NORMALIZATION:
        sae, overrides = stated.applied(sae, reader.__name__.rsplit(".", 1)[-1])
        metadata |= {"overrides": overrides} if overrides else {}
    _check(place.folder, sae)
    if k is not None and not (isinstance(sae.gate, TopK) and sae.gate.k == k):
        own = f"a TopK of k = {sae.gate.k}" if isinstance(sae.gate, TopK) else f"a {type(sae.gate).__name__}"
        raise CheckpointError(f"saes[].k is {k}, but the SAE in {weights} is {own}; leave k out")
    if chosen is None:
        if not metadata.get("hook_name"):
            raise CheckpointError(f"SAE {path} does not say where it belongs; give saes[].hook_point=blocks.<layer>.…")
        chosen = HookPoint.parse(metadata["hook_name"])
    return LoadedSae(
        name=name or place.name,
        hook_point=chosen,
        sae=sae,
        digest=_digest(place.folder, reader, weights, sae, metadata.get("overrides")),
        metadata=metadata,
    )


def is_sae(folder: Path) -> bool:
    """Whether a directory is laid out as a checkpoint of a known format."""
    return any(module.detect(folder) for module in FORMATS.values())


def _locate(path: str, revision: str | None, chosen: HookPoint | None) -> _Place:
    local = Path(path).expanduser()
    if revision is not None and (local.exists() or path.startswith(embedded.PREFIX)):
        raise CheckpointError(
            f"saes[].revision is {revision!r}, but {path} lies on this machine and has no revisions; leave it out"
        )
    if path.startswith(embedded.PREFIX):
        folder = embedded.sae_path(path)
        return _Place(folder=folder, name=folder.name)
    if local.is_file():
        return _Place(folder=local.parent, file=local, name=local.absolute().parent.name)
    if local.is_dir():
        return _Place(folder=local, name=local.absolute().name)
    parts = path.split("/")
    if local.is_absolute() or path.startswith((".", "~")) or len(parts) < 2:
        raise CheckpointError(f"SAE path {path} does not exist; expected a directory or a hub id org/repo[/folder]")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, inner = "/".join(parts[:2]), Path(*parts[2:])
    is_file = inner.suffix in SUFFIXES
    wanted = [str(inner), str(inner.parent / "*.json")] if is_file else [str(inner / "*")]
    try:
        root = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=None if is_file else _other_layers(chosen),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"SAE {path} is neither a local directory nor reachable on the hub: {error}") from error
    found = Path(root) / inner
    name = [part for part in parts if part][-2 if is_file else -1]
    return _Place(folder=found.parent, file=found, name=name) if is_file else _Place(folder=found, name=name)


def _other_layers(chosen: HookPoint | None) -> list[str]:
    """Names of weights files of all layers but the chosen one: a repository may hold gigabytes of them."""
    patterns = [name for reader in FORMATS.values() for name in reader.WEIGHTS if "{layer}" in name]
    layers = [layer for layer in range(_MAX_LAYERS) if chosen is None or layer != chosen.layer]
    return [f"*{pattern.format(layer=layer)}" for pattern in patterns for layer in layers]


def _reader(place: _Place, format_name: str | None) -> ModuleType:
    folder = place.folder
    if format_name is not None:
        if format_name not in FORMATS:
            raise CheckpointError(f"SAE format {format_name!r} is not known; expected one of {', '.join(FORMATS)}")
        if not FORMATS[format_name].detect(folder):
            raise CheckpointError(f"{folder} is not laid out as {format_name}; it has {_listing(folder)}")
        return FORMATS[format_name]
    found = [name for name, module in FORMATS.items() if module.detect(folder)]
    if len(found) > 1:
        raise CheckpointError(f"{folder} may be {' or '.join(found)}; say which with saes[].format")
    if not found and place.file is not None and place.file.suffix == ".pt":
        read_torch(place.file)  # raises if that is what is wrong
    if not found:
        raise CheckpointError(
            f"{folder} is not an SAE checkpoint of a known format ({', '.join(FORMATS)}); it has "
            f"{_listing(folder)}; expected for example cfg.json and sae_weights.safetensors, or one layer's own file"
        )
    return FORMATS[found[0]]


def _listing(folder: Path) -> str:
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(entries[:8]) + (", …" if len(entries) > 8 else "") or "no files"


def _weights(place: _Place, reader: ModuleType, chosen: HookPoint | None) -> Path:
    """The weights file: the one that was named, or the only one, or the one of the chosen layer."""
    named = place.file if place.file and place.file.suffix in SUFFIXES else None
    found = []
    for pattern in reader.WEIGHTS:
        found = sorted(place.folder.glob(pattern.format(layer="*")))
        if named is not None:
            found = [file for file in found if file == named]
        elif chosen is not None and chosen.stream == "resid_post" and "{layer}" in pattern:
            found = [file for file in found if file == place.folder / pattern.format(layer=chosen.layer)]
        if len(found) == 1:
            return found[0]
    expected = " or ".join(reader.WEIGHTS).format(layer="<layer>")
    if named is not None:
        raise CheckpointError(f"{named} is not the weights file of its folder; expected {expected}")
    by_layer = any("{layer}" in pattern for pattern in reader.WEIGHTS)
    which = "has no file" if not found else "has several files" if not by_layer else "has files of several layers"
    advice = ", or that layer's saes[].hook_point=blocks.<layer>.hook_resid_post" if by_layer else ""
    raise CheckpointError(f"{place.folder} {which} ({_listing(place.folder)}); give the path of {expected}{advice}")


def _digest(
    folder: Path, reader: ModuleType, weights: Path, sae: SparseAutoencoder, overrides: dict[str, Any] | None
) -> str:
    digest = hashlib.sha256()
    for file in _files(folder, reader, weights):
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(str(file.relative_to(folder)).encode() + hashlib.file_digest(opened, "sha256").digest())
    if isinstance(sae.gate, TopK) and not any(file.suffix == ".json" for file in _files(folder, reader, weights)):
        digest.update(str(sae.gate.k).encode())  # no file says it
    if overrides:
        digest.update(json.dumps(overrides, sort_keys=True).encode())
    return digest.hexdigest()


def _files(folder: Path, reader: ModuleType, weights: Path) -> list[Path]:
    """The files that decide the SAE; a format may know them only once it has looked into one."""
    if hasattr(reader, "files"):
        return list(reader.files(weights))
    return [weights if name in reader.WEIGHTS else folder / name for name in reader.FILES]


def _check(folder: Path, sae: SparseAutoencoder) -> None:
    """Every number is finite, and a token keeps at least one code."""
    holders = ((sae, ("w_enc", "b_enc", "w_dec", "b_dec")), (sae.gate, ("threshold", "b_gate", "b_mag", "r_mag")))
    for holder, names in holders:
        for name in names:
            values = getattr(holder, name, None)
            if values is not None and not torch.isfinite(values).all():
                raise CheckpointError(f"the SAE in {folder} has NaN or infinite values in {name}")
    if isinstance(sae.gate, TopK) and sae.gate.k < 1:
        raise CheckpointError(f"the SAE in {folder} would keep {sae.gate.k} codes of a token; expected at least 1")
