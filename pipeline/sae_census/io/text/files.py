"""Where files of text lie: what a part of a `corpus.source` names, under names that do not depend on folders."""

import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sae_census.errors import SourceError
from sae_census.io import embedded
from sae_census.io.text import folders
from sae_census.io.text.folders import PassedOver
from sae_census.io.text.rows import FORMATS, PACKED, format_of, is_known


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What a part of a `corpus.source` names: files, or a dataset."""

    files: tuple[tuple[str, Path], ...] = ()
    """With their names."""
    dataset: str | None = None
    """An id, or a directory that is a dataset (`folders.is_dataset`)."""
    is_directory: bool = False
    """Whether the files are those of a directory."""
    passed_over: tuple[PassedOver, ...] = ()


def locate(part: str, embedded_chars: int) -> Located:
    """Files with their names, or a dataset.

    A name that exists is that file or directory, whatever brackets it has. A directory that is no dataset is its
    files of known formats, at any depth, under the names that the glob `directory/**` gives them; others are passed
    over by name, which a glob refuses to.

    Args:
        part: of a `corpus.source`.
        embedded_chars: length of an embedded text.

    Raises:
        SourceError: if it names nothing that can be read.
    """
    if part.startswith(embedded.PREFIX):
        path = embedded.corpus_path(part, embedded_chars)
        return Located(files=((path.name, path),))
    if "://" in part:
        return Located(files=(_download(part),))
    if not part.strip():
        raise SourceError("corpus.source is an empty name; expected a file, a glob, a URL or a dataset")
    path = Path(part).expanduser()
    if path.is_file():
        format_of(path)
        return Located(files=((path.name, path),))
    if path.is_dir():
        return Located(dataset=part) if folders.is_dataset(path) else _directory(part, path)
    if glob.has_magic(part):
        return _glob(part, path)
    looks_local = path.is_absolute() or part.startswith((".", "~")) or part.count("/") > 1
    if looks_local or part.lower().endswith(FORMATS + PACKED):
        raise SourceError(f"corpus.source {part} does not exist; expected a file, a glob, a URL or a dataset")
    return Located(dataset=part)


def _glob(part: str, path: Path) -> Located:
    base = _before_magic(path.parts)
    found = folders.select(base, path.parts[len(base.parts) :])
    books = found.books(part)
    if not found.files:
        raise SourceError("; ".join([f"corpus.source {part} matches no file", *map(str, books)]))
    for file in sorted(found.files):
        format_of(file)
    return Located(files=_named(found), passed_over=tuple(books))


def _directory(part: str, path: Path) -> Located:
    found = folders.select(path, ("**",))
    for file in sorted(found.files):
        if not is_known(file):
            found.files.remove(file)
            found.pass_over("unknown_format", file)
    books = found.books(part)
    if not found.files:
        raise SourceError("; ".join([f"corpus.source {part} is a directory without a file to read", *map(str, books)]))
    return Located(files=_named(found), is_directory=True, passed_over=tuple(books))


def _named(found: folders.Selection) -> tuple[tuple[str, Path], ...]:
    return tuple((found.name(file), file) for file in sorted(found.files))


def _before_magic(parts: tuple[str, ...]) -> Path:
    """The folder that a pattern starts from: a part that exists under its very name is no pattern."""
    base = Path()
    for part in parts[:-1]:
        if glob.has_magic(part) and not (base / part).is_dir():
            break
        base /= part
    return base


def _download(url: str) -> tuple[str, Path]:
    import fsspec

    name = urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1]
    if not is_known(Path(name)):
        raise SourceError(f"corpus.source {url} names no file of a known format; expected {', '.join(FORMATS)}")
    target = embedded.cache_dir() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{name}.draft")
    try:
        with fsspec.open(url, "rb") as remote, draft.open("wb") as local:
            while block := remote.read(1 << 20):
                local.write(block)
    except Exception as error:  # every protocol has errors of its own
        raise SourceError(f"corpus.source {url} could not be fetched: {error}") from error
    draft.replace(target)
    return name, target


def repeated(files: Iterable[tuple[str, Path]]) -> list[str]:
    """The names of the files that are named more than once, each once."""
    by_place: dict[Path, list[str]] = {}
    for name, path in sorted(files):
        by_place.setdefault(path.resolve(), []).append(name)
    return [names[0] for names in by_place.values() if len(names) > 1]


def distinct(files: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Files by name, each once; a digest of its content sets apart those of one name in several folders."""
    once = {path.resolve(): (name, path) for name, path in sorted(files, reverse=True)}
    shared = Counter(name for name, _ in once.values())
    seen: Counter[str] = Counter()
    named = []
    for name, path in sorted(once.values()):
        _check_name(name, path)
        if shared[name] > 1:
            name = f"{name}#{digest([path])[:16]}"
            seen[name] += 1
            name += f"#{seen[name]}" if seen[name] > 1 else ""
        named.append((name, path))
    return named


def _check_name(name: str, path: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"corpus file {str(path)!a} has a name that is not UTF-8; rename it") from error


def groups(files: list[tuple[str, Path]], size: int) -> Iterator[list[tuple[str, Path]]]:
    """Runs of about `size` files; the cut falls after a file whose name hashes to a multiple of it."""
    group: list[tuple[str, Path]] = []
    for name, path in files:
        group.append((name, path))
        if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % size == 0:
            yield group
            group = []
    if group:
        yield group


def digest(paths: Iterable[Path]) -> str:
    """sha256 over the digests of files.

    Raises:
        SourceError: if one cannot be read.
    """
    whole = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SourceError(f"corpus file {path} cannot be read: {error.strerror}") from error
    return whole.hexdigest()
