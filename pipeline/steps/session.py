"""A worker's session: one loaded analyzer that answers preflight probes and analyses shards."""

from collections.abc import Mapping

from pipeline.config import AnalyzeConfig
from pipeline.records import Receipt
from pipeline.steps import preflight
from pipeline.steps.parts import Provenance
from pipeline.steps.preflight import Fit, FitProbe
from pipeline.steps.shard import Analyzer, Machine, ShardTask
from pipeline.types import SiteKey


class AnalysisSession:
    """What runs in each worker of `jobs.analyze`."""

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
