"""An SAE written as a checkpoint: in nanochat's format, or in the layout of SAELens."""

from pathlib import Path
from typing import Any, Literal, get_args

from sae_census.errors import ArgumentError, CheckpointError
from sae_census.io.checkpoints import nanochat, sae_lens

SaveFormat = Literal["nanochat", "sae_lens"]


def save_sae(
    sae: Any, config: Any, save_path: str | Path, *, save_format: SaveFormat = "nanochat", **metadata: Any
) -> None:
    """Write an SAE as a checkpoint that `load_sae` reads back with equal codes.

    `nanochat` writes one `.pt` file, with the config also in `<stem>.config.json`. `sae_lens` writes a directory of
    `cfg.json` and `sae_weights.safetensors`, which `SAE.load_from_disk` of SAELens 6 reads. What was folded into the
    weights stays folded; the unit of codes is noted beside them.

    Args:
        sae: what `load_sae` or `load_saes` gives, or an object of nanochat's SAE add-on.
        config: a mapping of JSON values, or an object with `to_dict()` that gives one; `hook_point` is required. Sizes,
            architecture, `k` and the unit of codes are filled in; they must be right where they are given.
        save_path: of the `.pt` file, or of the directory.
        save_format: `nanochat` holds relu, topk and gated SAEs without input normalisation; `sae_lens` standard, topk,
            jumprelu and gated ones, whose codes are never negative. A pre-encoder bias that the format lacks is folded.
        metadata: kept under the key `metadata` of the file; plain values, for nanochat also tensors.

    >>> save_sae(sae, {"hook_point": "blocks.1.hook_resid_post"}, folder / "sae", save_format="sae_lens", step=7)
    >>> sorted(path.name for path in (folder / "sae").iterdir())
    ['cfg.json', 'sae_weights.safetensors']
    >>> load_sae(str(folder / "sae")).metadata["step"]
    7

    Raises:
        ArgumentError: if the format cannot hold this SAE, or the config contradicts it; also a ValueError.
    """
    plain = nanochat.canonical(sae)
    try:
        about = nanochat.mapping(config)
    except CheckpointError as error:
        raise ArgumentError(f"config cannot be saved: {error}") from error
    match save_format:
        case "nanochat":
            nanochat.write(Path(save_path), plain, about, metadata)
        case "sae_lens":
            sae_lens.write(Path(save_path), plain, about, metadata)
        case _:
            known = ", ".join(get_args(SaveFormat))
            raise ArgumentError(f"save_format is {save_format!r}; expected one of {known}")
