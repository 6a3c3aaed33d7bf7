"""The whole config of every job as frozen values; the same models validate commands, YAML and HTTP bodies."""

from pipeline.config.ablate import AblateConfig
from pipeline.config.analyze import AnalyzeConfig, VerifyConfig
from pipeline.config.analyzer import FeatureAnalyzerConfig
from pipeline.config.attribute import AttributeConfig, DirectLogitAttributorConfig
from pipeline.config.catalog import SnapshotsConfig
from pipeline.config.compare import CompareConfig, PromptsConfig, RankBy, SideConfig
from pipeline.config.discover import DiscoverRequest, DiscoveryConfig, TauConfig
from pipeline.config.report import ReportConfig
from pipeline.config.sections import (
    BatchConfig,
    CatalogConfig,
    ClusterConfig,
    CorpusConfig,
    LogitsConfig,
    MasksConfig,
    ModelConfig,
    RankingConfig,
    SaeConfig,
    SamplingConfig,
    Section,
    StoreConfig,
    WorkerClass,
)
from pipeline.config.serve import ServeConfig
from pipeline.config.status import StatusConfig
from pipeline.config.steer import EditConfig, GenerateConfig, SteerConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.trace import TraceConfig

__all__ = [
    "AblateConfig",
    "AnalyzeConfig",
    "AttributeConfig",
    "BatchConfig",
    "CatalogConfig",
    "ClusterConfig",
    "CompareConfig",
    "CorpusConfig",
    "DirectLogitAttributorConfig",
    "DiscoverRequest",
    "DiscoveryConfig",
    "EditConfig",
    "FeatureAnalyzerConfig",
    "GenerateConfig",
    "LogitsConfig",
    "MasksConfig",
    "ModelConfig",
    "PromptsConfig",
    "RankBy",
    "RankingConfig",
    "ReportConfig",
    "SaeConfig",
    "SamplingConfig",
    "Section",
    "ServeConfig",
    "SideConfig",
    "SnapshotsConfig",
    "StatusConfig",
    "SteerConfig",
    "StoreConfig",
    "SweepConfig",
    "TauConfig",
    "TraceConfig",
    "VerifyConfig",
    "WorkerClass",
]
