"""The ledger of scheduled runs: one immutable record a run, and all of them as one table.

There is no lock: two ticks at the same time do the same work twice and publish it once.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CorruptError
from pipeline.io import schemas, tables
from pipeline.io.blobs import LocalBlobs
from pipeline.records import canonical
from pipeline.steps import entries

Status = Literal["done", "unchanged", "partly", "failed"]


class SweepRun(BaseModel):
    """What one run of an entry gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        folder = self._blobs.path("sweeps/runs")
        swept = entries.named(folder, entries.ENTRY) if entry is None else [entry]
        found = [
            self._read(f"sweeps/runs/{one}/{name}")
            for one in swept
            for name in entries.named(folder / one, entries.SWEPT)
        ]
        return sorted(found, key=lambda run: (run.started_at, run.entry))

    def _read(self, key: str) -> SweepRun:
        try:
            return SweepRun.model_validate_json(self._blobs.get(key))
        except ValidationError as error:
            raise CorruptError(
                f"{self._blobs.path(key)} is damaged: remove it, and its run will count as none"
            ) from error

    def add(self, run: SweepRun) -> None:
        """Record a run, and write the table anew."""
        key = f"sweeps/runs/{run.entry}/{_stamp(run.started_at)}.json"
        self._blobs.put_if_absent(key, canonical(run.model_dump(mode="json")))
        rows = [_row(one) for one in self.runs()]
        self._blobs.put("sweeps/sweeps.parquet", tables.to_bytes(tables.from_rows(schemas.SWEEPS, rows)))


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%S%f")


def _row(run: SweepRun) -> dict[str, Any]:
    statistics = [{"statistic": name, "value": value} for name, value in sorted(run.statistics.items())]
    return run.model_dump() | {"statistics": statistics}
