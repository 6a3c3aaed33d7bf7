"""Names and values that every floor shares: hook points, feature keys, shard references.

Axis letters, one legend for the whole project: B contexts in a batch, T positions, D d_model, F features,
K samples, W window, H bins, S shards, V vocabulary.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sae_census.errors import ConfigError

Stream = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "attn_z", "mlp_in", "mlp_out", "mlp_post"]
STREAMS: tuple[Stream, ...] = get_args(Stream)

_HOOK_NAMES: dict[Stream, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "mlp_post": "mlp.hook_post",
}
_STREAM_OF = {name: stream for stream, name in _HOOK_NAMES.items()}
_ALIASES: dict[str, Stream] = {"hook_attn": "attn_out", "attn": "attn_out", "hook_mlp": "mlp_out", "mlp": "mlp_out"}
"""What nanochat's SAE add-on calls the outputs of its modules."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(output|input))?")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_RESERVED = ("identity.json", "latest.json", "manifest.json", "reserved.json", "zarr.json", "attached", "ablations")
"""What a store itself calls files and folders."""


def wrong_with_name(name: str) -> str | None:
    """What keeps a name from being that of a catalog, an SAE, a slice or an entry of a sweep; None if nothing does.

    One pattern for all of them, because they become folders, keys and parts of addresses: up to 200 letters and digits
    of ASCII, dots, dashes and underscores, the first a letter or digit.
    """
    if name.lower() in _RESERVED:
        return "the store itself uses this name; choose another"
    if _NAME.fullmatch(name):
        return None
    return "expected up to 200 letters (A to Z), digits, dots, dashes and underscores, the first a letter or digit"


def twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Two different names that differ by case only: many file systems take them for one. None if there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if seen.setdefault(name.casefold(), name) != name:
            return seen[name.casefold()], name
    return None


@dataclass(frozen=True, slots=True, order=True)
class HookPoint:
    """Where activations are read: a stream of a block, written `blocks.15.hook_resid_post`.

    >>> HookPoint.parse("model.layers.15")
    HookPoint(layer=15, stream='resid_post')
    >>> str(HookPoint(3, "attn_z"))
    'blocks.3.attn.hook_z'
    """

    layer: int
    stream: Stream

    @classmethod
    def parse(cls, name: str) -> "HookPoint":
        """Read a hook point from its public name, or from a module path of a whole block.

        `hook_attn` and `hook_mlp` (also without `hook_`) are other names of `hook_attn_out` and `hook_mlp_out`.
        `model.layers.15` and `transformer.h.15.output` name the block's output (resid_post); a path that
        ends in `.input` names its input (resid_pre).

        Raises:
            ConfigError: if the name is none of these.
        """
        if (block := _BLOCK.fullmatch(name)) and (stream := (_STREAM_OF | _ALIASES).get(block[2])):
            return cls(int(block[1]), stream)
        if module := _MODULE.fullmatch(name):
            return cls(int(module[1]), "resid_pre" if module[2] == "input" else "resid_post")
        hint = ""
        if name.endswith("hook_mlp_in"):
            hint = "; hook_mlp_in is ambiguous: say mlp.hook_in (normed) or hook_resid_mid (not normed)"
        raise ConfigError(
            f"hook point {name!r} is not known; expected blocks.<layer>.<name> with <name> one of "
            f"{', '.join(_STREAM_OF)}{hint}"
        )

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{_HOOK_NAMES[self.stream]}"


@dataclass(frozen=True, slots=True)
class SiteKey:
    """One SAE at one hook point; with a feature id it is the key of a feature."""

    hook_point: HookPoint
    sae: str
    """The SAE's name, unique in a run."""

    @classmethod
    def parse(cls, site: str) -> "SiteKey":
        """Read a site from what `str` makes of it: `blocks.15.hook_resid_post/<sae>`.

        Raises:
            ConfigError: if it is none.
        """
        point, slash, sae = site.rpartition("/")
        if not slash or not sae:
            raise ConfigError(f"site {site!r} is not known; expected <hook point>/<SAE>")
        return cls(HookPoint.parse(point), sae)

    def __str__(self) -> str:
        return f"{self.hook_point}/{self.sae}"
