"""All SAEs of a directory by hook point, whatever formats they are of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import torch

from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ArgumentError, CheckpointError, ConfigError
from sae_census.io.checkpoints import FORMATS, load_sae, nanochat
from sae_census.types import HookPoint

_log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What is given to `load_sae`, and the weights file that it will read."""

    path: Path
    """The folder, or the file where a folder holds several."""
    weights: Path


def load_saes(
    sae_dir: str | Path, device: str | torch.device = "cpu", hook_points: Sequence[str] | None = None
) -> dict[str, SparseAutoencoder]:
    """The SAEs of a directory by hook point, sorted.

    Finds checkpoints of every supported format at any depth: the directory may be one SAE, or hold many. Of nanochat's
    files it takes `best_model.pt` and `checkpoint_*.pt` at any depth, else `*.pt` in the directory itself; of several
    for one hook point the best model, else the checkpoint with the highest step. What was taken and what was passed
    over is logged; a checkpoint that is not sound is skipped with a warning that names it.

    Args:
        sae_dir: the directory.
        device: where the SAEs are put.
        hook_points: give only these.

    Returns:
        One SAE in canonical form, float32, for each hook point.

    >>> load_saes(saes_dir).keys()
    dict_keys(['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post'])

    Raises:
        ArgumentError: if there is no such directory; also a ValueError.
        CheckpointError: if no checkpoint is sound, or two claim one hook point with equal right.
    """
    folder = Path(sae_dir).expanduser()
    if not folder.is_dir():
        raise ArgumentError(f"SAE directory does not exist: {sae_dir}")
    wanted = None if hook_points is None else {str(_point(name)) for name in hook_points}
    bad: list[CheckpointError] = []
    others = list(_checkpoints(folder))
    chosen = nanochat.choose(folder, wanted, {other.weights for other in others}, bad)
    for other in others:
        try:
            loaded = load_sae(str(other.path))
        except (CheckpointError, ConfigError) as error:
            bad.append(error if isinstance(error, CheckpointError) else CheckpointError(f"{other.path}: {error}"))
            continue
        hook_point = str(loaded.hook_point)
        if wanted is not None and hook_point not in wanted:
            continue
        if hook_point in chosen:
            raise CheckpointError(
                f"{chosen[hook_point][0]} and {other.weights} are both for {hook_point}; remove one, or load the "
                "other with load_sae"
            )
        chosen[hook_point] = other.weights, loaded.sae
    if bad and not chosen:
        more = "" if len(bad) == 1 else f" ({len(bad) - 1} more files are not sound)"
        raise CheckpointError(f"{bad[0]}{more}")
    for unsound in bad:
        _log.warning("skipping a file that is not sound: %s", unsound)
    for hook_point, (path, _) in sorted(chosen.items()):
        _log.info("loaded the SAE for %s from %s", hook_point, path)
    if not chosen:
        _log.warning("no SAEs found in %s%s", sae_dir, "" if hook_points is None else f" for {', '.join(hook_points)}")
    return {hook_point: sae.to(torch.device(device)) for hook_point, (_, sae) in sorted(chosen.items())}


def _checkpoints(root: Path) -> Iterator[_Checkpoint]:
    """The checkpoints below a directory that are not nanochat's."""
    for folder in [root, *sorted(path for path in root.rglob("*") if path.is_dir())]:
        found: set[Path] = set()
        for reader in FORMATS.values():
            if reader is not nanochat and reader.detect(folder):
                several = (sorted(folder.glob(pattern.format(layer="*"))) for pattern in reader.WEIGHTS)
                found.update(next((files for files in several if files), []))
        for weights in sorted(found):
            yield _Checkpoint(folder if len(found) == 1 else weights, weights)


def _point(name: str) -> HookPoint:
    try:
        return HookPoint.parse(str(name))
    except ConfigError as error:
        raise ArgumentError(str(error)) from error
