"""The ledger of scheduled runs: one immutable record a run, and all of them as one table.

There is no lock: two ticks at the same time do the same work twice and publish it once.
"""

from datetime import datetime
from typing import Any, Literal

from sae_census.errors import CorruptError
from sae_census.io.store import schemas, tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Record
from sae_census.steps.store import entries

Status = Literal["done", "unchanged", "partly", "failed"]


class SweepRun(Record):
    """What one run of an entry gave."""

    entry: str
    started_at: datetime
    finished_at: datetime
    status: Status
    catalog: str
    snapshot: int | None
    digest: str | None
    message: str
    statistics: dict[str, float]
    """Against the snapshot before."""
    alerts: list[str]
    """What is out of bounds, in words."""


class Ledger:
    """The runs of a store."""

    def __init__(self, blobs: LocalBlobs):
        self._blobs = blobs

    def runs(self, entry: str | None = None) -> list[SweepRun]:
        """All runs, or those of one entry, by start."""
        found = [self.read(key) for key in self.records(entry)]
        return sorted(found, key=lambda run: (run.started_at, run.entry))

    def records(self, entry: str | None = None) -> list[str]:
        """The records of all runs, or of those of one entry, sorted."""
        folder = self._blobs.path("sweeps/runs")
        swept = entries.named(folder, entries.ENTRY) if entry is None else [entry]
        return [f"sweeps/runs/{one}/{name}" for one in swept for name in entries.named(folder / one, entries.SWEPT)]

    def read(self, key: str) -> SweepRun:
        """The run of a record.

        Raises:
            CorruptError: if it is damaged.
        """
        try:
            return SweepRun.read(self._blobs.get(key), key)
        except CorruptError as error:
            raise CorruptError(
                f"{self._blobs.path(key)} is damaged: remove it, and its run will count as none"
            ) from error

    def add(self, run: SweepRun) -> None:
        """Record a run, and write the table anew."""
        key = f"sweeps/runs/{run.entry}/{_stamp(run.started_at)}.json"
        self._blobs.put_if_absent(key, run.to_bytes())
        rows = [_row(one) for one in self.runs()]
        self._blobs.put("sweeps/sweeps.parquet", tables.to_bytes(tables.from_rows(schemas.SWEEPS, rows)))


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%S%f")


def _row(run: SweepRun) -> dict[str, Any]:
    statistics = [{"statistic": name, "value": value} for name, value in sorted(run.statistics.items())]
    return run.model_dump() | {"statistics": statistics}
