"""What `--sae` may name: one SAE, a folder of SAEs, or a YAML mapping of layers and streams to SAEs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sae_census.config import SaeConfig
from sae_census.errors import ConfigError
from sae_census.io.checkpoints import is_sae
from sae_census.types import STREAMS, HookPoint

_PLACE = re.compile(r"(\d+)/(\w+)")


def saes_named(given: str) -> list[SaeConfig]:
    """The SAEs behind a name.

    A mapping has entries such as `22/resid_pre: path`, `blocks.22.hook_resid_pre: path`, or
    `22: {resid_pre: path, mlp_out: path}`; paths in it are relative to its file. In place of a path may stand the
    keys of `saes[]`, as `22/resid_pre: {path: path, normalize_activations: constant_norm_rescale}`.

    Raises:
        ConfigError: if a mapping is not one.
    """
    path = Path(given).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _mapping(path)
    if path.is_dir() and not is_sae(path):
        inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and is_sae(folder)]
        if inside:
            return [SaeConfig(path=str(folder)) for folder in inside]
    return [SaeConfig(path=given)]


def _mapping(path: Path) -> list[SaeConfig]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the mapping {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    entries = list(_entries(path, content))
    if not entries:
        raise ConfigError(f"the mapping {path} names no SAE; expected lines such as '22/resid_pre: path/of/sae'")
    return entries


def _entries(path: Path, content: Any) -> Iterator[SaeConfig]:
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping; expected lines such as '22/resid_pre: path/of/sae'")
    for key, value in content.items():
        by_stream = isinstance(value, dict) and "path" not in value
        inner = {f"{key}/{stream}": sae for stream, sae in value.items()} if by_stream else {key: value}
        for place, sae in inner.items():
            yield _sae(path, str(place), sae)


def _sae(path: Path, place: str, given: Any) -> SaeConfig:
    keys = {"path": given} if isinstance(given, str) else given
    if not isinstance(keys, dict) or not isinstance(keys.get("path"), str) or not keys["path"]:
        raise ConfigError(f"{path}: {place} maps to {given!r}; expected the path of an SAE")
    beside = path.parent / keys["path"]
    where = str(beside) if beside.exists() else keys["path"]
    try:
        return SaeConfig.model_validate(keys | {"path": where, "hook_point": _hook_point(path, place)})
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"{path}: {place} has a key that is no key of saes[], or no value of one: {what}") from error


def _hook_point(path: Path, place: str) -> str:
    found = _PLACE.fullmatch(place)
    if found is None and place.isdigit():
        raise ConfigError(f"{path}: say the stream, too, as {place}/resid_pre: one layer has many")
    if found is None:
        try:
            return str(HookPoint.parse(place))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    stream = next((stream for stream in STREAMS if stream == found[2]), None)
    if stream is None:
        raise ConfigError(f"{path}: {place!r} names no stream; expected one of {', '.join(STREAMS)}")
    return str(HookPoint(int(found[1]), stream))
