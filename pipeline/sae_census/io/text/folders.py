"""What a glob or a directory holds: the files to read, and those that are passed over, each with its reason.

A wildcard never matches a name that begins with a dot, as in a shell: `*` and `**` pass over `.cache/a.jsonl` and
`._a.jsonl`, and a part of the pattern that begins with a dot itself matches them. `**` enters every folder but no
link to one, so that no loop of links reads a file twice.

A directory is one of two things, and `is_dataset` is the border between them. A dataset has a card, a description or
a layout of the datasets library, and that library decides what belongs to a split. Any other directory is its files,
however they are named: what the glob `directory/**` matches.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml

from sae_census.errors import SourceError

Why = Literal["dot", "linked_folder", "dead_link", "unknown_format", "left_out", "twice", "several_slices"]

_SENTENCES: dict[Why, str] = {
    "dot": "{files} not read, because a name begins with a dot; a pattern that names the dot reads such files",
    "linked_folder": "{folders} not entered, because ** follows no links; name a folder to read it",
    "dead_link": "{files} not read: links that lead nowhere",
    "unknown_format": "{files} not read, of no format that is known",
    "left_out": "{files} not read, in no split of this dataset; a glob reads them as files",
    "twice": "{files} named more than once, and counted once",
    "several_slices": "{files} named by several slices, and counted in each of them",
}
_MARKS = ("dataset_dict.json", "state.json", "dataset_info.json", "dataset_infos.json", ".huggingface.yaml")
"""Of a dataset that was saved, or described."""
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Folders that the datasets library takes for splits."""
_SHARD = re.compile(r"\w[\w.-]*-[0-9]{5}-of-[0-9]{5}.*\..+")
_CARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """Files that a corpus.source comes upon and does not read as they stand there."""

    where: str
    """The part of a corpus.source, or the slice."""
    why: Why
    count: int
    first: str
    """The first of them by name."""

    def __str__(self) -> str:
        verb = "is" if self.count == 1 else "are"
        nouns = {noun: f"{self.count} {noun.removesuffix('s' if self.count == 1 else '')} {verb}"
                 for noun in ("files", "folders")}  # fmt: skip
        return f"corpus.source {self.where}: {_SENTENCES[self.why].format(**nouns)} (the first: {self.first})"


@dataclass(slots=True)
class Selection:
    """What a pattern matches below a folder."""

    base: Path
    files: set[Path] = field(default_factory=set)
    passed: dict[Why, set[Path]] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """Of a file, inside the base."""
        return path.relative_to(self.base).as_posix()

    def pass_over(self, why: Why, path: Path) -> None:
        """Book a file that is not read."""
        self.passed.setdefault(why, set()).add(path)

    def books(self, where: str) -> list[PassedOver]:
        """What is passed over, by reason."""
        return [book(where, why, map(self.name, paths)) for why, paths in sorted(self.passed.items())]


def book(where: str, why: Why, names: Iterable[str]) -> PassedOver:
    """Names as one entry of the books; at least one."""
    known = sorted(name.encode(errors="backslashreplace").decode() for name in names)  # a name may be no UTF-8
    return PassedOver(where=where, why=why, count=len(known), first=known[0])


def select(base: Path, pattern: tuple[str, ...]) -> Selection:
    """The files below a folder that a pattern matches.

    Args:
        base: the folder.
        pattern: its parts. `**` stands for any number of folders, at the end for all files in them.

    Raises:
        SourceError: if a folder cannot be listed.
    """
    found = Selection(base)
    parts = [part if part == "**" else re.sub(r"\*{2,}", "*", part) for part in pattern]
    _walk(found, base, [*parts, "*"] if parts[-1] == "**" else parts, dot=False)
    # What one way leads to is read, whatever the other ways say.
    reached = found.files.union(*(path.parents for path in found.files))
    found.passed = {why: left for why, paths in found.passed.items() if (left := paths - reached)}
    return found


def _walk(found: Selection, folder: Path, pattern: list[str], *, dot: bool) -> None:
    head, *rest = pattern
    if head == "**":
        _walk(found, folder, rest, dot=dot)
        for path in _entries(folder):
            if path.is_dir():
                _enter(found, path, pattern, dot=dot or path.name.startswith("."))
        return
    for path in _matching(folder, head):
        hidden = dot or (path.name.startswith(".") and not head.startswith("."))
        if rest:
            if path.is_dir():
                _walk(found, path, rest, dot=hidden)
        elif path.is_file():
            if hidden:
                found.pass_over("dot", path)
            else:
                found.files.add(path)
        elif path.is_symlink() and not path.exists():
            found.pass_over("dot" if hidden else "dead_link", path)


def _enter(found: Selection, folder: Path, pattern: list[str], *, dot: bool) -> None:
    if folder.is_symlink():
        found.pass_over("dot" if dot else "linked_folder", folder)
    elif dot and not os.access(folder, os.R_OK | os.X_OK):  # nothing in it would be read
        found.pass_over("dot", folder)
    else:
        _walk(found, folder, pattern, dot=dot)


def _matching(folder: Path, part: str) -> Iterator[Path]:
    if glob.has_magic(part):
        yield from (path for path in _entries(folder) if fnmatchcase(path.name, part))
    elif os.path.lexists(folder / part):
        yield folder / part


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"corpus.source: the folder {folder} cannot be listed: {error.strerror}") from error


def is_dataset(folder: Path) -> bool:
    """Whether a directory is a dataset, and not just its files.

    It is one if it has, directly in it, any of

    - a dataset card: a README.md that begins with a block of YAML between lines of `---`, which is a mapping;
    - `dataset_info.json`, `dataset_infos.json` or `.huggingface.yaml`;
    - what `save_to_disk` writes: `state.json` or `dataset_dict.json`;
    - a folder that is named as a split (train, training, validation, valid, val, dev, test, testing, eval,
      evaluation), in it or in its folder `data`, with a file in it;
    - a file in its folder `data` that is named as the shard of a split: `train-00000-of-00002.parquet`.

    Names of other files decide nothing: `train-a.jsonl` beside `extra.jsonl` are two files.
    """
    if any((folder / mark).is_file() for mark in _MARKS) or _has_card(folder):
        return True
    inside = folder / "data"
    for split in (parent / name for parent in (folder, inside) for name in _SPLITS):
        if split.is_dir() and any(not path.name.startswith(".") for path in _entries(split)):
            return True
    return inside.is_dir() and any(_SHARD.fullmatch(path.name) and path.is_file() for path in _entries(inside))


def _has_card(folder: Path) -> bool:
    try:
        with (folder / "README.md").open("rb") as file:
            head = file.read(_CARD_BYTES).decode(errors="replace").removeprefix("\ufeff")
    except OSError:
        return False
    block = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", head, re.DOTALL | re.MULTILINE)
    try:
        return block is not None and isinstance(yaml.safe_load(block[1]), dict)
    except yaml.YAMLError:  # the datasets library would call it a damaged card
        return True


def left_out(folder: Path, used: Iterable[str]) -> list[PassedOver]:
    """The files of a dataset's directory that are in none of its splits, its card and descriptions apart.

    Args:
        folder: of the dataset.
        used: where the files of all its splits lie.
    """
    found = select(folder, ("**",))
    taken = {Path(path).resolve() for path in used}
    for path in found.files:
        if path.resolve() not in taken and path.name not in (*_MARKS, "README.md"):
            found.pass_over("left_out", path)
    return found.books(str(folder))
