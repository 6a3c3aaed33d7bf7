"""A worker's session: one loaded analyzer that answers preflight probes and analyses shards."""

from collections.abc import Mapping

from sae_census.config import AnalyzeConfig
from sae_census.records import Receipt
from sae_census.steps.census import preflight
from sae_census.steps.census.preflight import Fit, FitProbe
from sae_census.steps.census.shard import Analyzer, Machine, ShardTask
from sae_census.steps.model.provenance import Provenance
from sae_census.types import SiteKey


class AnalysisSession:
    """What runs in each worker of `sae-census analyze`."""

    def __init__(
        self,
        config: AnalyzeConfig,
        preparation_id: str,
        measure_ids: Mapping[SiteKey, str],
        expected: Machine,
        partial_format: int,
        planned: Provenance,
    ):
        self._analyzer = Analyzer(config, preparation_id, measure_ids, expected, partial_format, planned)

    def run(self, task: ShardTask | FitProbe) -> tuple[Receipt, ...] | list[Fit]:
        """A probe gives fits, a shard its receipts."""
        if isinstance(task, FitProbe):
            return preflight.measure(self._analyzer, task)
        return self._analyzer.run(task)
