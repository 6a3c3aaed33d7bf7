"""The whole config of every job as frozen values; the same models validate commands, YAML and HTTP bodies."""

from sae_census.config.ablate import AblateConfig
from sae_census.config.analyze import AnalyzeConfig, VerifyConfig
from sae_census.config.analyzer import FeatureAnalyzerConfig
from sae_census.config.attribute import AttributeConfig, DirectLogitAttributorConfig
from sae_census.config.catalog import SnapshotsConfig
from sae_census.config.compare import CompareConfig, PromptsConfig, RankBy, SideConfig
from sae_census.config.discover import DiscoverRequest, DiscoveryConfig, TauConfig
from sae_census.config.report import ReportConfig
from sae_census.config.sections import (
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
from sae_census.config.serve import ServeConfig
from sae_census.config.status import StatusConfig
from sae_census.config.steer import EditConfig, GenerateConfig, SteerConfig
from sae_census.config.sweep import SweepConfig
from sae_census.config.trace import TraceConfig

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
