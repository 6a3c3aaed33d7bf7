"""Write a catalog as pages for a browser: one index.html and small data files, opened from disk or served as files.

Data lie in a folder named by what they are made of; the page that points to it is written last, and what older
reports left is removed after that. A run that died is run again, and nobody ever opens half a report.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_census.config import ReportConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.catalog.report_data import CHUNK, SiteData, by_layer, overview
from sae_census.io import report
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import canonical
from sae_census.steps.store import layout
from sae_census.steps.store.progress import RunLog, new_run

INDEX = "index.html"
_FOLDER = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run of the job gave."""

    index: Path
    """The page to open."""
    num_features: int
    """Of all SAEs."""
    num_files: int
    num_bytes: int
    seconds: float


def write_report(config: ReportConfig, say: Callable[[str], None] | None = None) -> Report:
    """Write a catalog as pages that a browser opens from disk.

    Args:
        config: which catalog and snapshot, and how many features are shown.
        say: hears every line that is meant for people; by default they go to stderr.

    Returns:
        Where the pages lie, how many files and bytes they are, and the seconds it took.

    Raises:
        UserError: if there is no such catalog, or its disk is full.
    """
    began = time.monotonic()
    catalog = Catalog(config.store.root, config.catalog.name, config.snapshot)
    facts = overview(catalog, config.features)
    sizes_of_saes = [site["num_features"] for site in facts["sites"]]
    made_of = hashlib.sha256(canonical([facts, report.viewer_digest()])).hexdigest()
    data = f"data/{made_of[:16]}"
    blobs = LocalBlobs(config.out or catalog.attached / "report")
    log = RunLog(LocalBlobs(config.store.root), layout.events(new_run()), say)
    sizes = []

    def write(key: str, body: bytes) -> None:
        blobs.put(key, body)
        sizes.append(len(body))

    with log.stage("report", sum(-(-size // CHUNK) for size in sizes_of_saes), "features") as stage:
        for number, name in enumerate(by_layer(catalog)):
            site = SiteData(catalog, name)  # one SAE in memory at a time
            write(f"{data}/{number}/table.js", report.data_file(f"{number}/table", site.table()))
            for chunk, content in site.chunks(config.features):
                write(f"{data}/{number}/{chunk}.js", report.data_file(f"{number}/{chunk}", content))
                stage.advance(len(content["features"]))
    write(INDEX, report.viewer(f"{catalog.manifest.catalog} {catalog.number:06d}", facts | {"data": data}))
    _remove_others(blobs, data)
    return Report(
        index=blobs.path(INDEX),
        num_features=sum(sizes_of_saes),
        num_files=len(sizes),
        num_bytes=sum(sizes),
        seconds=time.monotonic() - began,
    )


def _remove_others(blobs: LocalBlobs, data: str) -> None:
    """Remove the data of older reports."""
    with blobs.writing():
        for folder in blobs.path("data").iterdir():
            if _FOLDER.fullmatch(folder.name) and folder != blobs.path(data):
                shutil.rmtree(folder)
