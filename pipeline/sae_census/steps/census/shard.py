"""Analyse one shard: one forward pass per batch feeds every SAE; of each a partial is written, then its receipt.

Batches are cut inside the shard, in order, at a fixed size; the last is padded to full shape and masked. So
a shard gives the same bytes whoever analyses it, and whenever.
"""

import hashlib
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor

from sae_census.compute.census import masks
from sae_census.compute.census.census import FIT_EVERY, SiteCensus
from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.documents import document_grid
from sae_census.config import AnalyzeConfig
from sae_census.errors import NumericsError, ShardError
from sae_census.io.loading.versions import others, versions
from sae_census.io.model import device
from sae_census.io.model.device import choose_device
from sae_census.io.store import partials, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Receipt, ShardRecord, Stored
from sae_census.steps.census.sampling import sample_sizes, shard_key
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import Reader
from sae_census.steps.store import layout
from sae_census.steps.store.identities import Numerics
from sae_census.types import HookPoint, SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Contexts of one forward pass, padded to full shape."""

    first_row: int
    input_ids: Int[np.ndarray, "B T"]
    num_tokens: Int[np.ndarray, " B"]
    """Real tokens of each context; 0 for rows that only fill the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard, and the SAEs to look at it with."""

    shard: ShardRecord
    sites: tuple[SiteKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What computes: equal ones give equal bits."""

    numerics: Numerics
    """As from `io.device.configure`."""
    versions: dict[str, str]
    """Of the software, as from `io.versions`."""

    def differs_from(self, other: "Machine") -> str:
        """In what, in words; empty if it computes the same bits."""
        names = sorted(self.numerics.keys() | other.numerics.keys())
        of_numerics = [
            f"{name} {self.numerics.get(name)} and {other.numerics.get(name)}"
            for name in names
            if self.numerics.get(name) != other.numerics.get(name)
        ]
        return ", ".join(filter(None, [*of_numerics, others(self.versions, other.versions)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What a shard gave for one SAE: the partial, and the books of its receipt."""

    body: bytes
    tokens: dict[str, int]
    contexts: int
    documents: dict[str, int]


def read_documents(
    blobs: LocalBlobs, preparation_id: str, shard: ShardRecord, num_positions: int
) -> Int32[np.ndarray, "R T"]:
    """The document of every token of a shard, as `document_grid` numbers them."""
    path = blobs.path(layout.shard(preparation_id, shard.shard_id))
    runs = tables.read(path, ["document_id", "document_start"])
    first_run, document_id = tables.ragged(runs, "document_id")
    _, run_start = tables.ragged(runs, "document_start")
    return document_grid(
        np.repeat(np.arange(shard.num_contexts), np.diff(first_run)),
        run_start.astype(np.int64),
        np.concatenate([[True], document_id[1:] != document_id[:-1]]),
        num_rows=shard.num_contexts,
        num_positions=num_positions,
    )


class Analyzer:
    """Holds the model and the SAEs and turns shards into partials."""

    def __init__(
        self,
        config: AnalyzeConfig,
        preparation_id: str,
        measure_ids: Mapping[SiteKey, str],
        expected: Machine,
        partial_format: int,
        planned: Provenance,
    ):
        """Load model and SAEs.

        Args:
            config: of the job, every null key of a mask settled.
            preparation_id: names the folder of shards.
            measure_ids: by SAE.
            expected: the machine that the run was planned with.
            partial_format: of the measures, as `steps.plan` counts them.
            planned: the parts that it was planned with.

        Raises:
            NumericsError: if this machine is another, and the measures are not mixed.
            IdentityError: if model, tokenizer or an SAE is not what was planned.
        """
        self._config, self._preparation_id, self._measure_ids = config, preparation_id, measure_ids
        self._format = partial_format
        self._blobs = LocalBlobs(config.store.root)
        chosen = choose_device(config.model.device)
        numerics = device.configure(config.cluster.threads_per_worker, chosen)
        machine = Machine(numerics=dict(numerics), versions=versions(chosen))
        if (what := machine.differs_from(expected)) and not config.cluster.mixed_numerics:
            raise NumericsError(f"this worker computes other bits than the run was planned with: {what}")
        self._reader = Reader(config.model, config.saes, planned)
        self._reader.drop_above()
        tokenizer = self._reader.tokenizer
        # until format 3 an ordinary token that also pads was taken for a special one
        self._special_ids = tokenizer.special_ids if partial_format > 3 else tokenizer.named_special_ids
        attention = {"attention": self._reader.model.attention}
        self.machine = Machine(numerics=dict(numerics), versions=machine.versions | attention)
        self.saes, self.points = self._reader.saes, self._reader.points

    def batches(self, contexts: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The fixed batch grid: contexts in order, the last batch padded to full shape."""
        num_rows, shape = self._config.batch.contexts, self._config.corpus.context_length
        for first in range(0, len(contexts), num_rows):
            rows = contexts[first : first + num_rows]
            input_ids = np.full((num_rows, shape), self._reader.fill_id, np.int64)
            for row, ids in enumerate(rows):
                input_ids[row, : len(ids)] = ids
            lengths = np.array([*map(len, rows), *[0] * (num_rows - len(rows))], np.int64)
            yield Batch(first_row=first, input_ids=input_ids, num_tokens=lengths)

    def contexts(self, shard_id: str) -> list[list[int]]:
        """The token ids of a shard's contexts."""
        path = self._blobs.path(layout.shard(self._preparation_id, shard_id))
        rows: list[list[int]] = tables.read(path, ["input_ids"]).column(0).to_pylist()
        return rows

    def activations(self, batch: Batch) -> tuple[dict[HookPoint, Tensor], dict[HookPoint, Int8[np.ndarray, "B T"]]]:
        """Finite activations (B, T, D) and the mask books of every hook point.

        Raises:
            ShardError: if an activation is NaN or infinite, with its address.
        """
        chosen = self._config.masks
        rules = masks.token_rules(
            batch.input_ids,
            batch.num_tokens,
            special_ids=self._special_ids if chosen.special_tokens else (),
            first_positions=chosen.first_positions,
            positions=chosen.positions,
        )
        got = self._reader.activations(torch.from_numpy(batch.input_ids))
        books = {}
        for point, x in got.items():
            self._check_finite(point, x, batch)
            books[point] = rules
            if chosen.max_norm_ratio is not None:
                outliers = masks.norm_outliers(x, batch.num_tokens, chosen.max_norm_ratio)
                books[point] = masks.with_rule(rules, outliers, "max_norm_ratio")
            if chosen.attention_sinks:
                real = np.arange(x.shape[1]) < batch.num_tokens[:, None]
                sinks = masks.attention_sinks(*masks.sizes(x), real)
                books[point] = masks.with_rule(books[point], sinks, "attention_sinks")
        return got, books

    def _check_finite(self, point: HookPoint, x: Tensor, batch: Batch) -> None:
        if torch.isfinite(x.sum(dtype=torch.float32)):  # one pass; NaN and Inf survive a sum
            return
        real = torch.arange(x.shape[1])[None] < torch.from_numpy(batch.num_tokens)[:, None]
        broken = (~torch.isfinite(x).all(dim=2).cpu() & real).nonzero()
        if len(broken):
            row, position = broken[0].tolist()
            raise ShardError(
                f"activations at {point} are NaN or infinite at context {batch.first_row + row}, position "
                f"{position}; try model.dtype=float32 or bfloat16"
            )
        x[~torch.isfinite(x)] = 0  # only what fills the batch; it is masked

    def run(self, task: ShardTask) -> tuple[Receipt, ...]:
        """Analyse a shard and commit it; receipts in the order of the task's SAEs.

        Raises:
            ShardError: if it would fail again the same way.
        """
        began = time.monotonic()
        measured = self._measure(task)
        seconds = time.monotonic() - began
        ran = {"host": socket.gethostname(), "at": time.time(), "seconds": round(seconds, 3), **asdict(self.machine)}
        return tuple(self._commit(task.shard, self._measure_ids[site], measured[site], ran) for site in task.sites)

    def _commit(self, shard: ShardRecord, measure_id: str, measured: _Measured, ran: dict[str, Any]) -> Receipt:
        sha256 = hashlib.sha256(measured.body).hexdigest()
        stored = Stored(key=layout.partial(measure_id, sha256), sha256=sha256, num_bytes=len(measured.body))
        receipt = Receipt(
            shard=shard,
            measure_id=measure_id,
            partial=stored,
            tokens=measured.tokens,
            contexts=measured.contexts,
            documents=measured.documents,
            ran=ran,
        )
        self._blobs.put(stored.key, measured.body)
        self._blobs.put(layout.receipt(measure_id, shard.shard_id), receipt.to_bytes())
        return receipt

    def digest(self, shard: ShardRecord, site: SiteKey) -> str:
        """sha256 of the partial that this shard gives; nothing is written."""
        return hashlib.sha256(self._measure(ShardTask(shard=shard, sites=(site,)))[site].body).hexdigest()

    def _measure(self, task: ShardTask) -> dict[SiteKey, _Measured]:
        config, shard = self._config, task.shard
        document = read_documents(self._blobs, self._preparation_id, shard, config.corpus.context_length)
        censuses = {
            key: SiteCensus(
                self.saes[key].num_features,
                self.saes[key].width,
                sample_sizes(config.sampling, self._format),
                seed=config.sampling.seed,
                shard_key=shard_key(shard.shard_id),
                documents=document,
                keep_codes=config.codes == "keep",
            )
            for key in task.sites
        }
        tokens: dict[HookPoint, Counter[str]] = {point: Counter() for point in self.points}
        contexts: Counter[HookPoint] = Counter()
        for batch in self.batches(self.contexts(shard.shard_id)):
            got, books = self.activations(batch)
            real = batch.num_tokens > 0
            for point in self.points:
                tokens[point].update(masks.tally(books[point][real]))
                contexts[point] += int((books[point] == masks.COUNTED).any(axis=1).sum())
            for key, census in censuses.items():
                counted = books[key.hook_point] == masks.COUNTED
                x = got[key.hook_point]
                with torch.inference_mode():
                    codes = self.saes[key].encode(x, batch.first_row)
                    self._add_fit(key, census, x, codes, counted, batch.first_row)
                census.add(codes, counted, batch.first_row)
        measured = {}
        for key, census in censuses.items():
            attributes: dict[str, Any] = {"shard_id": shard.shard_id, "measure_id": self._measure_ids[key]}
            if self._format > 3:  # partials of format 3 do not say it
                attributes["format"] = self._format
            body = partials.pack(census.finish(), attributes)
            of_document = census.document_tokens
            measured[key] = _Measured(
                body=body,
                tokens=dict(tokens[key.hook_point]),
                contexts=contexts[key.hook_point],
                documents={
                    "counted": int((of_document > 0).sum()),
                    "tokens_square": int((of_document**2).sum()),
                },
            )
        return measured

    def _add_fit(
        self,
        key: SiteKey,
        census: SiteCensus,
        x: Float[Tensor, "B T D"],
        codes: Codes,
        counted: np.ndarray,
        first_row: int,
    ) -> None:
        """Reconstruct the contexts of the fit sample, one by one, so that shapes never change."""
        for row in range(-first_row % FIT_EVERY, len(x), FIT_EVERY):
            mine = codes.where(codes.row == first_row + row)
            one = x[row : row + 1]
            error = one.float() - self.saes[key].reconstruct(one, mine, first_row + row)
            keep = counted[row]
            census.add_fit(one[0].float().cpu().numpy()[keep], error[0].cpu().numpy()[keep])
