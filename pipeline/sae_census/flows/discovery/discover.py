"""Discovery: which features does a prompt or text use? One request, or a file of prompts in batches.

A batch is cut into chunks of lines; a chunk is answered in batched passes and written under a folder beside the
output that is named by all that decides the answers, so that the same command goes on where it was stopped.
"""

import difflib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_census.config import ClusterConfig, DiscoverRequest, DiscoveryConfig
from sae_census.errors import CensusError, ConfigError, RequestError, SourceError
from sae_census.findings import Discovery
from sae_census.io import embedded
from sae_census.io.loading.versions import versions
from sae_census.io.model import device
from sae_census.io.model.device import choose_device, choose_dtype
from sae_census.io.store import json_lines
from sae_census.io.store.blobs import LocalBlobs
from sae_census.io.store.memo import ArrayCache
from sae_census.records import digest_of
from sae_census.steps.cluster import run_tasks
from sae_census.steps.discovery.background import load_backgrounds, read_labels, snapshot_folder
from sae_census.steps.discovery.discoverer import Discoverer
from sae_census.steps.discovery.requests import Loaded
from sae_census.steps.model.parts import Provenance, facts_of, tokenizer_of
from sae_census.steps.model.reader import Reader, load_saes
from sae_census.steps.store.progress import RunLog
from sae_census.types import SiteKey

CHUNK_LINES = 128
MAX_LINE_BYTES = 8 << 20


def open_discoverer(config: DiscoveryConfig, planned: Provenance | None = None) -> Discoverer:
    """Load model, SAEs and background.

    Args:
        config: names them.
        planned: what model, tokenizer and SAEs have to be; None: whatever lies there.

    Raises:
        UserError: if they cannot be read or do not belong together.
    """
    model = config.model
    chosen = choose_device(model.device)
    numerics = device.configure(config.threads, chosen)
    reader = Reader(model, config.saes, planned)
    reader.warn_of_centring()
    facts = reader.model.facts
    dtype = str(choose_dtype(model.dtype, chosen)).removeprefix("torch.")
    identity = {
        "model": facts.digest,
        "dtype": dtype,
        "tokenizer": reader.tokenizer.digest,
        "numerics": numerics,
        "versions": versions(chosen),
    }
    folder = embedded.cache_dir() / "discover"
    loaded = Loaded(
        reader=reader,
        model_id=config.model_name or model.id,
        model_digest=facts.digest,
        dtype=dtype,
        identity=identity,
        sae_ids=_sae_ids(config, list(reader.loaded)),
        max_tokens=min(config.max_tokens, facts.max_positions or config.max_tokens),
        backgrounds=None if config.catalog is None else load_backgrounds(config.catalog, reader.loaded),
        labels={} if config.labels is None else read_labels(config.labels, reader.loaded),
    )
    return Discoverer(loaded, ArrayCache(folder, config.cache_mb << 20) if config.cache_mb else None)


def _sae_ids(config: DiscoveryConfig, sites: list[SiteKey]) -> dict[str, list[SiteKey]]:
    ids: dict[str, list[SiteKey]] = {} if config.sae_id is None else {config.sae_id: sites}
    for site in sites:
        mine = ids.setdefault(site.sae, [])
        if site not in mine:
            mine.append(site)
    return ids


def discover(config: DiscoveryConfig, request: DiscoverRequest) -> Discovery:
    """Answer one request.

    Raises:
        UserError: if something is missing or wrong.
    """
    return open_discoverer(config).discover(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a worker needs to answer chunks of a file of prompts."""

    config: DiscoveryConfig
    planned: Provenance
    request: dict[str, Any]
    """Fields of every request but its text."""
    prompts: str
    parts: str
    """Folder for answered chunks."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of lines."""

    number: int
    offset: int
    num_bytes: int
    first_line: int
    num_lines: int
    num_prompts: int
    """Lines that are not blank."""

    @property
    def key(self) -> str:
        """Of its answers."""
        return f"{self.number:08d}.jsonl"


class BatchWorker:
    """Answers chunks one by one."""

    def __init__(self, batch: Batch):
        self._batch, self._discoverer = batch, open_discoverer(batch.config, batch.planned)

    def run(self, chunk: Chunk) -> int:
        """Answer a chunk and write its answers; how many they are. A blank line has none."""
        with Path(self._batch.prompts).open("rb") as file:
            file.seek(chunk.offset)
            lines = file.read(chunk.num_bytes).removesuffix(b"\n").split(b"\n")
        records: list[dict[str, Any]] = [{"line": chunk.first_line + i} for i in range(len(lines))]
        asked: list[tuple[int, DiscoverRequest]] = []
        others: dict[int, list[str]] = {}
        for i, line in enumerate(lines):
            try:
                given = _record_of(line)
                if "id" in given:
                    records[i]["id"] = given.pop("id")
                if not given.keys() & {"prompt", "text"}:
                    raise RequestError('expected {"prompt": …}, {"text": …} or a string', "line")
                others[i] = [name for name in given if name not in _FIELDS]
                options = {name: value for name, value in given.items() if name in _FIELDS}
                asked.append((i, DiscoverRequest.model_validate(_overridden(self._batch.request, options))))
            except (RequestError, ValidationError) as error:
                records[i]["error"] = _why(error)
        for (i, _), answer in zip(asked, self._discoverer.discover_many([r for _, r in asked]), strict=True):
            if isinstance(answer, Discovery):
                records[i] |= _with_note(answer, others[i]).model_dump()
            else:
                records[i]["error"] = _why(answer)
        answered = [record for record, line in zip(records, lines, strict=True) if line.strip()]
        LocalBlobs(self._batch.parts).put(chunk.key, "".join(map(json_lines.line, answered)).encode())
        return len(answered)


def _record_of(line: bytes) -> dict[str, Any]:
    """The fields of a line: prompt or text, id, and options of its own; a string is a prompt.

    Other keys come along, to be told of.

    Raises:
        RequestError: if it is neither an object nor a string, or has a key that looks like an option and is none.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RequestError(f"the line has {len(line)} bytes, more than {MAX_LINE_BYTES}", "line")
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}", "line") from error
    if isinstance(record, str):
        return {"prompt": record}
    if not isinstance(record, dict):
        raise RequestError('expected {"prompt": …}, {"text": …} or a string', "line")
    for name in record:
        near = difflib.get_close_matches(name.lower(), _FIELDS, 1, cutoff=0.8)
        if name not in _FIELDS and near:
            raise RequestError(f"a line has no option {name[:80]}; did you mean {near[0]}?", name[:80])
    return record


_FIELDS = frozenset({*DiscoverRequest.model_fields, "min_coverage", "id"})
"""Of a line of a batch."""
PASSED_OVER = "keys of the line that are no options were passed over: "
"""How a note of an answer begins that tells of them."""


def _with_note(answer: Discovery, others: Sequence[str]) -> Discovery:
    if not others:
        return answer
    note = PASSED_OVER + ", ".join(name[:80] for name in others[:10])
    return answer.model_copy(
        update={"analyzed": answer.analyzed.model_copy(update={"notes": [*answer.analyzed.notes, note]})}
    )


def _overridden(request: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line before those of the command; min_coverage and min_coverage_pct are one field."""
    if given.keys() & {"min_coverage", "min_coverage_pct"}:
        request = {name: value for name, value in request.items() if name not in ("min_coverage", "min_coverage_pct")}
    return request | given


def _why(error: Exception) -> dict[str, str]:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return {"field": ".".join(map(str, first["loc"])) or "prompt", "message": first["msg"]}
    return {"field": getattr(error, "field", "") or "prompt", "message": str(error)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What a batch gave."""

    folder: Path
    """Of the parts."""
    keys: tuple[str, ...]
    num_prompts: int
    num_blank: int
    """Lines with nothing on them; they have no answer."""
    num_resumed: int
    """Prompts that an earlier run had answered."""
    seconds: float

    def records(self) -> Iterator[dict[str, Any]]:
        """The answers, one a line, in the order of the prompts."""
        for key in self.keys:
            yield from map(json.loads, json_lines.lines(LocalBlobs(self.folder).get(key)))

    def remove(self) -> None:
        """Forget the parts: the answers are where they belong."""
        shutil.rmtree(self.folder, ignore_errors=True)


def discover_batch(
    config: DiscoveryConfig,
    request: dict[str, Any],
    prompts: Path,
    out: Path,
    cluster: ClusterConfig,
    say: Callable[[str], None] | None = None,
) -> BatchReport:
    """Answer every line of a file of prompts.

    Args:
        config: of the discoverer.
        request: fields of every request, its text excepted.
        prompts: JSON lines: `{"prompt": …}`, `{"text": …}` or strings, with an `id` and options of a request if you
            like; these go before those of the command. Blank lines are passed over.
        out: parts of the work are kept beside it until it is whole.
        cluster: who works.
        say: hears progress.

    Raises:
        UserError: if the file cannot be read, or nothing can be answered as asked.
    """
    began = time.monotonic()
    try:
        with prompts.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        chunks = list(_chunks(prompts))
    except OSError as error:
        raise SourceError(f"the prompts {prompts} cannot be read: {error.strerror}") from error
    num_prompts = sum(chunk.num_prompts for chunk in chunks)
    if not num_prompts:
        raise SourceError(f"the file {prompts} has no line with a prompt")
    _check(request)
    planned = plan_of(config)
    contents = [version("sae-census"), asdict(planned), *_contents(config)]
    settings = [digest, request, config.model_dump(mode="json", exclude={"cache_mb"}), CHUNK_LINES, contents]
    folder = out.with_name(f".{out.name}.{digest_of(settings)[:12]}")
    blobs = LocalBlobs(folder)
    left = [chunk for chunk in chunks if not blobs.exists(chunk.key)]
    batch = Batch(
        config=config.model_copy(update={"cache_mb": 0, "threads": cluster.threads_per_worker}),
        planned=planned,
        request=request,
        prompts=str(prompts.resolve()),
        parts=str(folder.resolve()),
    )
    log = RunLog(blobs, "events.jsonl", say)
    with log.stage("discover", len(left), "prompts") as stage:
        for outcome in run_tasks(partial(BatchWorker, batch), left, cluster, on_event=log.event):
            if outcome.result is None:
                raise CensusError(f"lines from {outcome.task.first_line}: {outcome.kind}: {outcome.message}")
            stage.advance(outcome.result)
    return BatchReport(
        folder=folder,
        keys=tuple(chunk.key for chunk in chunks),
        num_prompts=num_prompts,
        num_blank=sum(chunk.num_lines for chunk in chunks) - num_prompts,
        num_resumed=num_prompts - sum(chunk.num_prompts for chunk in left),
        seconds=time.monotonic() - began,
    )


def plan_of(config: DiscoveryConfig) -> Provenance:
    """What lies now where a config names model, tokenizer and SAEs; they are hashed, and the model is not loaded."""
    return Provenance(
        model=facts_of(config.model).digest,
        tokenizer=tokenizer_of(config.model).digest,
        saes={str(site): loaded.digest for site, loaded in load_saes(config.saes).items()},
    )


def _contents(config: DiscoveryConfig) -> list[str]:
    """Digests of the tables that the config names: what lies at a path may change between two runs."""
    files = []
    if config.labels is not None:
        files.append(Path(config.labels).expanduser())
    if config.catalog is not None:
        files.append(snapshot_folder(config.catalog) / "manifest.json")
    try:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error


def _check(request: dict[str, Any]) -> None:
    """What is wrong with every line is wrong with the command."""
    try:
        DiscoverRequest.model_validate(request | {"prompt": "a"})
    except ValidationError as error:
        raise ConfigError("{field}: {message}".format(**_why(error))) from error


def _chunks(path: Path) -> Iterator[Chunk]:
    with path.open("rb") as file:
        number = offset = num_bytes = lines = prompts = 0
        for line in file:
            num_bytes, lines, prompts = num_bytes + len(line), lines + 1, prompts + bool(line.strip())
            if lines == CHUNK_LINES:
                yield Chunk(number, offset, num_bytes, number * CHUNK_LINES + 1, lines, prompts)
                number, offset = number + 1, offset + num_bytes
                num_bytes = lines = prompts = 0
        if lines:
            yield Chunk(number, offset, num_bytes, number * CHUNK_LINES + 1, lines, prompts)
