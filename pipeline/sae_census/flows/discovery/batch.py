"""A file of prompts, answered in batches.

The file is cut into chunks of lines; a chunk is answered in batched passes and written under a folder beside the
output that is named by all that decides the answers, so that the same command goes on where it was stopped.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_census.config import ClusterConfig, DiscoverRequest, DiscoveryConfig
from sae_census.errors import CensusError, ConfigError, RequestError, SourceError
from sae_census.findings import Discovery
from sae_census.flows.discovery.discover import open_discoverer, plan_of
from sae_census.io.store import json_lines
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import digest_of
from sae_census.steps.cluster import run_tasks
from sae_census.steps.discovery import lines
from sae_census.steps.discovery.background import snapshot_folder
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.store.progress import RunLog

CHUNK_LINES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
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

    def __init__(self, batch: BatchSettings):
        self._batch, self._discoverer = batch, open_discoverer(batch.config, batch.planned)

    def run(self, chunk: Chunk) -> int:
        """Answer a chunk and write its answers; how many they are. A blank line has none."""
        with Path(self._batch.prompts).open("rb") as file:
            file.seek(chunk.offset)
            texts = file.read(chunk.num_bytes).removesuffix(b"\n").split(b"\n")
        records: list[dict[str, Any]] = [{"line": chunk.first_line + i} for i in range(len(texts))]
        asked: list[tuple[int, DiscoverRequest]] = []
        others: dict[int, list[str]] = {}
        for i, line in enumerate(texts):
            try:
                given = lines.record_of(line)
                if "id" in given:
                    records[i]["id"] = given.pop("id")
                if not given.keys() & {"prompt", "text"}:
                    raise RequestError('expected {"prompt": …}, {"text": …} or a string', "line")
                others[i] = [name for name in given if name not in lines.FIELDS]
                options = {name: value for name, value in given.items() if name in lines.FIELDS}
                asked.append((i, DiscoverRequest.model_validate(lines.overridden(self._batch.request, options))))
            except (RequestError, ValidationError) as error:
                records[i]["error"] = lines.reason_of(error)
        for (i, _), answer in zip(asked, self._discoverer.discover_many([r for _, r in asked]), strict=True):
            if isinstance(answer, Discovery):
                records[i] |= lines.with_note(answer, others[i]).model_dump()
            else:
                records[i]["error"] = lines.reason_of(answer)
        answered = [record for record, line in zip(records, texts, strict=True) if line.strip()]
        LocalBlobs(self._batch.parts).put(chunk.key, "".join(map(json_lines.line, answered)).encode())
        return len(answered)


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
    batch = BatchSettings(
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
        raise ConfigError("{field}: {message}".format(**lines.reason_of(error))) from error


def _chunks(path: Path) -> Iterator[Chunk]:
    with path.open("rb") as file:
        number = offset = num_bytes = num_lines = prompts = 0
        for line in file:
            num_bytes, num_lines, prompts = num_bytes + len(line), num_lines + 1, prompts + bool(line.strip())
            if num_lines == CHUNK_LINES:
                yield Chunk(number, offset, num_bytes, number * CHUNK_LINES + 1, num_lines, prompts)
                number, offset = number + 1, offset + num_bytes
                num_bytes = num_lines = prompts = 0
        if num_lines:
            yield Chunk(number, offset, num_bytes, number * CHUNK_LINES + 1, num_lines, prompts)
