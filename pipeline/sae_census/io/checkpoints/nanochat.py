"""nanochat SAEs: `.pt` files with `sae_state_dict` and `config`, read without pickles and written.

The config stands in the file, else in `<stem>.config.json` or `config.json` beside it. Architectures topk, relu
and gated (a gate matrix of its own), all without a pre-encoder bias.

In this format the gates of topk and gated let negative values through, unless `postact` in the config says relu, which
`save_sae` writes for an SAE whose gate ends in one. A feature fires where its code is above 0.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from sae_census.compute.numbers.sae import Gate, Gated, Postact, Relu, SparseAutoencoder, TopK
from sae_census.errors import ArgumentError, CheckpointError, ConfigError
from sae_census.io.checkpoints.files import check_config, positive, read_torch
from sae_census.io.checkpoints.stated import Stated
from sae_census.types import HookPoint

_BEST = "best_model.pt"
WEIGHTS = (_BEST, "*.pt")
_OTHERS = (".sae.pt", "ae.pt")
"""Of files that other formats name so."""
_ACTIVATIONS = "topk, relu, gated"
_UNSAID: dict[str, Any] = {"postact": "identity", "codes_scale": 1.0, "codes_times_decoder_norm": False}
"""What no config of the format says; `save_sae` says what differs: a gate's ReLU, and in what units codes are."""
_log = getLogger(__name__)


class _File(NamedTuple):
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    config_path: Path | None
    """None: the config is in the file itself."""


def detect(folder: Path) -> bool:
    """Whether a directory has a `best_model.pt`, or another `.pt` file that is a checkpoint of this format.

    Raises:
        CheckpointError: if `best_model.pt` holds pickled objects.
    """
    best = folder / _BEST
    if best.is_file():
        return _is_ours(read_torch(best))
    for file in sorted(folder.glob("*.pt")):
        with contextlib.suppress(CheckpointError):
            if not file.name.endswith(_OTHERS) and _is_ours(read_torch(file)):
                return True
    return False


def files(weights: Path) -> tuple[Path, ...]:
    """What decides the SAE of a file; its digest is over these."""
    found = _read(weights)
    return (found.path,) if found.config_path is None else (found.path, found.config_path)


def read(weights: Path, _tensors: Mapping[str, Tensor], _stated: Stated) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of a file, and its config with the hook point also as `hook_name`.

    Raises:
        CheckpointError: if a key or tensor is missing or does not fit.
    """
    found = _read(weights)
    return _sae(found), found.config | {"hook_name": found.config["hook_point"]}


def canonical(sae: Any) -> SparseAutoencoder:
    """An SAE in canonical form: one that is in it, what `load_sae` returns, or an object of nanochat's SAE add-on.

    Raises:
        ArgumentError: if it is none of these, or a tensor of it does not fit; also a ValueError.
    """
    if isinstance(sae, SparseAutoencoder):
        return sae
    if isinstance(inner := getattr(sae, "sae", None), SparseAutoencoder):
        return inner
    state = sae.state_dict() if isinstance(sae, torch.nn.Module) else {}
    try:
        config = mapping(getattr(sae, "config", None))
        if not {"W_enc", "b_enc", "W_dec", "b_dec"} <= state.keys() or "activation" not in config:
            raise CheckpointError("expected an SAE of load_saes or load_sae, or of nanochat's SAE add-on")
        return _sae(_File(Path(type(sae).__name__), config, state, None))
    except CheckpointError as error:
        raise ArgumentError(
            f"a {type(sae).__name__} cannot be taken as an SAE: {error}; save it in its own format and give what "
            "load_sae makes of that"
        ) from error


def write(path: Path, sae: SparseAutoencoder, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write a `.pt` file, with its config also in `<stem>.config.json`; a pre-encoder bias is folded into b_enc.

    Args:
        path: of the file.
        sae: relu, topk or gated, without input normalisation.
        config: JSON values; `hook_point` is required. `d_in`, `d_sae`, `activation` and `k` are filled in, as is
            `postact` for a topk or gated SAE that ends in a ReLU and the unit of codes that are not of raw activations;
            they must be right where they are given.
        metadata: tensors and plain values.

    Raises:
        ArgumentError: if the format cannot hold this SAE, or the config contradicts it.
    """
    if path.suffix != ".pt":
        raise ArgumentError(f"save_path is {path}; expected a file that ends in .pt")
    tensors, facts = _state(sae)
    facts |= {"codes_scale": sae.scale, "codes_times_decoder_norm": sae.decoder_norm}
    facts |= {"postact": sae.gate.postact} if isinstance(sae.gate, TopK | Gated) else {}
    check_config(config, facts)
    whole = dict(config) | {key: value for key, value in facts.items() if value != _UNSAID.get(key)}
    try:
        _checked_config(path, whole)
        body = json.dumps(whole, indent=2)
    except (CheckpointError, TypeError) as error:
        raise ArgumentError(f"config cannot be saved: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save({"sae_state_dict": tensors, "config": json.loads(body), "metadata": dict(metadata)}, draft)
        read_torch(draft)
        draft.replace(path)
    except CheckpointError as error:
        raise ArgumentError(f"metadata {', '.join(metadata)} must be tensors and plain values: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    _config_paths(path)[0].write_text(body + "\n")


def mapping(config: Any) -> dict[str, Any]:
    """A config as a mapping: one, a dataclass, or an object with `to_dict()`.

    Raises:
        CheckpointError: if it is none of these.
    """
    if callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    elif is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping):
        raise CheckpointError(f"it is a {type(config).__name__}; expected a mapping, or an object with to_dict()")
    return dict(config)


def _state(sae: SparseAutoencoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint and the config's facts about them."""
    facts: dict[str, Any] = {"d_in": sae.width, "d_sae": sae.num_features}
    if sae.transform != "none":
        raise ArgumentError(f"the SAE normalises its input ({sae.transform}), which this format cannot say")
    tensors = {"W_enc": sae.w_enc, "b_enc": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    match sae.gate:
        case TopK(k):
            facts |= {"activation": "topk", "k": k}
        case Relu():
            facts |= {"activation": "relu"}
        case Gated(b_gate, b_mag, r_mag, w_gate, _):
            facts |= {"activation": "gated"}
            tensors |= {"W_gate": sae.w_enc if w_gate is None else w_gate, "b_gate": b_gate}
            tensors |= {"W_enc": sae.w_enc * r_mag.exp(), "b_enc": b_mag}
        case _:
            raise ArgumentError(f"a {type(sae.gate).__name__} gate has no name in this format; it has {_ACTIVATIONS}")
    if sae.pre_bias is not None:
        for kind in ("enc", "gate") if "W_gate" in tensors else ("enc",):
            tensors[f"b_{kind}"] = tensors[f"b_{kind}"] - sae.pre_bias @ tensors[f"W_{kind}"]
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, facts


def choose(
    folder: Path, hook_points: set[str] | None, foreign: set[Path], bad: list[CheckpointError]
) -> dict[str, tuple[Path, SparseAutoencoder]]:
    """The file to read for each hook point of a directory, and its SAE.

    Args:
        folder: the directory.
        hook_points: all that are wanted; None: any.
        foreign: files of other formats, which are passed over.
        bad: takes the errors of files that are not sound.

    Raises:
        CheckpointError: if two files claim one hook point with equal right.
    """
    chosen = {}
    for hook_point, several in _by_hook_point(folder, hook_points, foreign, bad).items():
        best = _best(hook_point, several, bad)
        if best is not None:
            chosen[hook_point] = best
    return chosen


def _candidates(folder: Path) -> list[Path]:
    named = [*folder.glob(f"**/{_BEST}"), *folder.glob("**/checkpoint_*.pt")]
    return sorted(named or folder.glob("*.pt"))


def _by_hook_point(
    folder: Path, hook_points: set[str] | None, foreign: set[Path], bad: list[CheckpointError]
) -> dict[str, list[_File]]:
    """The files that can be opened; the others go to `bad`."""
    found: dict[str, list[_File]] = {}
    for path in _candidates(folder):
        if path in foreign:
            continue
        try:
            file = _open(path)
        except CheckpointError as error:
            bad.append(error)
            continue
        if file is None:
            _log.warning("no config found for %s, skipping", path)
        elif hook_points is None or file.config["hook_point"] in hook_points:
            found.setdefault(file.config["hook_point"], []).append(file)
    return found


def _best(hook_point: str, several: list[_File], bad: list[CheckpointError]) -> tuple[Path, SparseAutoencoder] | None:
    """The first file by right that is sound, and its SAE; those before it go to `bad`."""
    order = sorted(several, key=_right, reverse=True)
    for place, best in enumerate(order):
        others = order[place + 1 :]
        if others and _right(best) == _right(others[0]):
            raise CheckpointError(
                f"{best.path} and {others[0].path} are both for {hook_point}, and neither is a later checkpoint; "
                "remove one, or load the other with load_sae"
            )
        try:
            sae = _sae(best)
        except CheckpointError as error:
            bad.append(error)
            continue
        for other in others:
            _log.info("%s is passed over: %s comes first for %s", other.path, best.path.name, hook_point)
        return best.path, sae
    return None


def _right(file: _File) -> tuple[bool, int]:
    """What a file goes by among those of one hook point: the best model, else the highest step."""
    step = re.fullmatch(r"checkpoint_\D*(\d+)\.pt", file.path.name)
    return file.path.name == _BEST, int(step[1]) if step else -1


def _config_paths(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.stem}.config.json"), path.with_name("config.json")


def _read(path: Path) -> _File:
    file = _open(path)
    if file is None:
        own, shared = _config_paths(path)
        raise CheckpointError(f"{path} has no config in it, and there is no {own.name} or {shared.name} beside it")
    return file


def _open(path: Path) -> _File | None:
    """A checkpoint, its tensors mapped and not yet read; None if it has no config.

    Raises:
        CheckpointError: if it is not one of this format, or its config does not fit it.
    """
    checkpoint = read_torch(path)
    if not _is_ours(checkpoint):
        has = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(f"{path} is no nanochat SAE: expected a dict with sae_state_dict, it has {has}")
    config, config_path = checkpoint.get("config"), None
    if config is None:
        config_path = next((p for p in _config_paths(path) if p.is_file()), None)
        if config_path is None:
            return None
        try:
            config = json.loads(config_path.read_text())
        except ValueError as error:
            raise CheckpointError(f"the config in {config_path} is not JSON: {error}") from error
    return _File(path, _checked_config(config_path or path, config), checkpoint["sae_state_dict"], config_path)


def _is_ours(checkpoint: Any) -> bool:
    return isinstance(checkpoint, dict) and isinstance(checkpoint.get("sae_state_dict"), dict)


def _checked_config(path: Path, config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise CheckpointError(f"the config in {path} is {type(config).__name__}; expected a mapping")
    missing = [key for key in ("d_in", "activation", "hook_point") if config.get(key) is None]
    if missing:
        raise CheckpointError(f"the config in {path} has no {', '.join(missing)}")
    try:
        hook_point = str(HookPoint.parse(str(config["hook_point"])))
    except ConfigError as error:
        raise CheckpointError(f"the config in {path}: {error}") from error
    return config | {"hook_point": hook_point}


def _sae(file: _File) -> SparseAutoencoder:
    """The SAE of an open file, its shapes proved."""
    config = file.config
    width, num_features = config["d_in"], config.get("d_sae")
    if num_features is None:
        num_features = width * config.get("expansion_factor", 8)
    shapes = {"W_enc": (width, num_features), "b_enc": (num_features,), "W_dec": (num_features, width)}
    shapes |= {"b_dec": (width,)}
    if config["activation"] == "gated":
        shapes |= {"W_gate": (width, num_features), "b_gate": (num_features,)}
    tensors = {}
    for name, shape in shapes.items():
        tensor = file.tensors.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else "missing"
            raise CheckpointError(f"{file.path}: {name} is {got}; expected {shape} by its config")
        tensors[name] = tensor.float().clone()
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{file.path} has NaN or infinite values in {name}")
    gate, b_enc = _gate(file, tensors), tensors["b_enc"]
    return SparseAutoencoder(
        w_enc=tensors["W_enc"],
        b_enc=torch.zeros_like(b_enc) if isinstance(gate, Gated) else b_enc,
        w_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        gate=gate,
        scale=positive(file.path, config.get("codes_scale", 1.0), "codes_scale"),
        decoder_norm=config.get("codes_times_decoder_norm") is True,
    )


def _gate(file: _File, tensors: Mapping[str, Tensor]) -> Gate:
    postact: Any = file.config.get("postact", "identity")
    if postact not in get_args(Postact):
        raise CheckpointError(f"{file.path} gives postact as {postact!r}; expected {' or '.join(get_args(Postact))}")
    match file.config["activation"]:
        case "relu":
            return Relu()
        case "topk":
            k = file.config.get("k", 64)
            if not isinstance(k, int) or k < 1:
                raise CheckpointError(f"{file.path} is of a topk SAE but gives k as {k!r}")
            return TopK(k, postact)
        case "gated":
            b_enc = tensors["b_enc"]
            return Gated(tensors["b_gate"], b_enc, torch.zeros_like(b_enc), tensors["W_gate"], postact)
        case other:
            raise CheckpointError(f"{file.path}: activation {other!r} is not known; expected one of {_ACTIVATIONS}")
