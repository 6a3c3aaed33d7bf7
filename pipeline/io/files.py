"""Where files of text lie: what a part of a `corpus.source` names, under names that do not depend on folders."""

import glob
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import SourceError
from pipeline.io import embedded
from pipeline.io.rows import FORMATS, PACKED, format_of


def locate(part: str, embedded_chars: int) -> list[tuple[str, Path]] | str:
    """Files with their names, or the id of a dataset.

    Args:
        part: of a `corpus.source`.
        embedded_chars: length of an embedded text.

    Raises:
        SourceError: if it names nothing that can be read.
    """
    if part.startswith(embedded.PREFIX):
        path = embedded.corpus_path(part, embedded_chars)
        return [(path.name, path)]
    if "://" in part:
        return [_download(part)]
    path = Path(part).expanduser()
    if path.is_file():
        format_of(path)
        return [(path.name, path)]
    if path.is_dir():
        return part
    if glob.has_magic(part):
        base = Path(*_before_magic(path.parts))
        pattern = Path(*path.parts[len(base.parts) :])
        files = [file for file in base.glob(str(pattern)) if file.is_file()]
        if not files:
            raise SourceError(f"corpus.source {part} matches no file")
        for file in files:
            format_of(file)
        return [(file.relative_to(base).as_posix(), file) for file in files]
    looks_local = path.is_absolute() or part.startswith((".", "~")) or part.count("/") > 1
    if looks_local or any(part.endswith(suffix) for suffix in FORMATS + PACKED):
        raise SourceError(f"corpus.source {part} does not exist; expected a file, a glob, a URL or a dataset")
    return part


def _before_magic(parts: tuple[str, ...]) -> list[str]:
    fixed = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _download(url: str) -> tuple[str, Path]:
    import fsspec

    name = urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1]
    format_of(Path(name))
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


def distinct(files: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Files by name, each once; a digest of its content sets apart those of one name in several folders."""
    once = {path.resolve(): (name, path) for name, path in sorted(files, reverse=True)}
    shared = Counter(name for name, _ in once.values())
    seen: Counter[str] = Counter()
    named = []
    for name, path in sorted(once.values()):
        if shared[name] > 1:
            name = f"{name}#{digest([path])[:16]}"
            seen[name] += 1
            name += f"#{seen[name]}" if seen[name] > 1 else ""
        named.append((name, path))
    return named


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
