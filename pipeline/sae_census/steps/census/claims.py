"""What a catalog's name stands for, and today's settings in the form that the name was claimed in.

The law: a name keeps for ever the form it was claimed in, so that equal settings give equal ids and nothing is computed
twice; a new name gets today's form. In a form that is older than today's

- a field that did not exist then is left out if it has the meaning that its absence had (`_ABSENT`); with any other
  value it stands there, and is refused by its name;
- the tokenizer is named by the digest of its files;
- partials keep no silent contexts of single features, and their sizes of samples do not say how many;
- numerics hold the version of torch, the one of then: versions are told, and decide no identity any more;
- `preparation.format` also says by which rules documents are cut: whoever prepares looks at it.

A key of the config that is null means for a new name what the key says, and for any other what its name was claimed
with. A form that is newer than today's is refused.
"""

from typing import Any

from sae_census.config import MasksConfig
from sae_census.errors import CorruptError, IdentityError
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.records import unsealed
from sae_census.steps.census import publish
from sae_census.steps.store import layout
from sae_census.steps.store.identities import Identity, Measure, Measures, check_formats

_OF_FILES = {"preparation": 1, "measure": 3}
"""The last formats in which a tokenizer was named by its files, and torch stood among the numerics."""
_ABSENT = {("masks", "attention_sinks"): False}
"""What it meant that a field of a measure was not there yet."""


def claimed(blobs: LocalBlobs, name: str) -> Identity | None:
    """What a name stands for; None if it is free.

    A damaged record is read off the newest sound snapshot. Where there never was a snapshot, nothing rests on the name.

    Raises:
        CorruptError: if the record and all snapshots are damaged.
        IdentityError: if it was written by a newer version.
    """
    key = layout.identity(name)
    if not blobs.exists(key):
        return None
    try:
        body, path = blobs.get(key), str(blobs.path(key))
        check_formats(unsealed(body, path)[0], f"catalog {name!r}")
        return Identity.read(body, path)
    except CorruptError as error:
        numbers = publish.snapshots(blobs, name)
        for number in reversed(numbers):
            try:
                return publish.read_manifest(blobs, name, number).identity
            except CorruptError:
                continue
        if numbers:
            raise CorruptError(f"{error}, and so are its snapshots; remove {name!r} and analyse again") from error
        return None


def resolved(masks: MasksConfig, claim: Identity | None) -> MasksConfig:
    """The masks with every null key settled.

    Args:
        masks: of the config.
        claim: what the catalog's name stands for.
    """
    if masks.attention_sinks is not None:
        return masks
    settled = True if claim is None else masks_of(claim.measure).attention_sinks
    return masks.model_copy(update={"attention_sinks": settled})


def masks_of(measure: Measure | Measures) -> MasksConfig:
    """The masks of a measure of any format."""
    absent = {key: value for (section, key), value in _ABSENT.items() if section == "masks"}
    return MasksConfig.model_validate(absent | measure.content()["masks"])


def expressed(identity: Identity, claim: Identity | None, tokenizer: Tokenizer) -> Identity:
    """Today's identity in the form of a claim.

    Args:
        identity: in today's form.
        claim: what the catalog's name stands for.
        tokenizer: of the model.
    """
    if claim is None:
        return identity
    preparation, measure = identity.preparation.content(), identity.measure.content()
    if claim.preparation.format == _OF_FILES["preparation"]:
        preparation |= {"format": _OF_FILES["preparation"], "tokenizer": tokenizer.file_digest}
    if claim.measure.format == _OF_FILES["measure"]:
        then = claim.measure.content()
        measure |= {"format": then["format"], "model": measure["model"] | {"tokenizer": tokenizer.file_digest}}
        if isinstance(measure["numerics"], dict) and isinstance(then["numerics"], dict):
            measure["numerics"] = measure["numerics"] | {"torch": then["numerics"].get("torch")}
        measure["sampling"] = {name: value for name, value in measure["sampling"].items() if name in then["sampling"]}
        for (section, key), meaning in _ABSENT.items():
            if key not in then[section] and measure[section].get(key) == meaning:
                measure[section] = {name: value for name, value in measure[section].items() if name != key}
    return Identity.model_validate({"preparation": preparation, "measure": measure})


def claim(blobs: LocalBlobs, name: str, identity: Identity) -> None:
    """Make a catalog's name stand for an identity, or prove that it already does; its record is sound then.

    Raises:
        IdentityError: naming every field that differs.
    """
    key, body = layout.identity(name), identity.to_bytes()
    if not blobs.put_if_absent(key, body):
        check_claim(blobs, name, identity)
        if blobs.get(key) != body:  # damaged, or without a seal
            blobs.put(key, body)


def check_claim(blobs: LocalBlobs, name: str, identity: Identity) -> None:
    """Prove that a catalog's name is free, or stands for this identity.

    Raises:
        IdentityError: naming every field that differs.
    """
    there = claimed(blobs, name)
    if there is not None and (found := differences(there, identity)):
        what = "; ".join(f"{k} was {there!r}, now {here!r}" for k, (there, here) in found.items())
        raise IdentityError(
            f"catalog {name!r} in {blobs.root} was made under other settings: {what}; go back to those, or choose "
            "another catalog.name or store.root"
        )


def differences(a: Identity, b: Identity) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between two identities, by their dotted names; None where a side lacks one."""
    one, other = _flat(a.content()), _flat(b.content())
    return {k: (one.get(k), other.get(k)) for k in sorted(one.keys() | other.keys()) if one.get(k) != other.get(k)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}
