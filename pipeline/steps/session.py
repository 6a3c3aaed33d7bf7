"""A worker's session: one loaded analyzer that answers preflight probes and analyses shards."""

from pipeline.config import AnalyzeConfig
from pipeline.records import Receipt, ShardRecord
from pipeline.steps import preflight
from pipeline.steps.preflight import Fit, FitProbe
from pipeline.steps.shard import Analyzer


class AnalysisSession:
    """What runs in each worker of `jobs.analyze`."""

    def __init__(self, config: AnalyzeConfig, preparation_id: str, measure_id: str, numerics: dict[str, str | int]):
        self._analyzer = Analyzer(config, preparation_id, measure_id, numerics)

    def run(self, task: ShardRecord | FitProbe) -> Receipt | list[Fit]:
        """A probe gives fits, a shard its receipt."""
        if isinstance(task, FitProbe):
            return preflight.measure(self._analyzer, task)
        return self._analyzer.run(task)
