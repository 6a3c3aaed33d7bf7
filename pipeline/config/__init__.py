"""The whole config of every job as frozen values; the same models validate commands, YAML and HTTP bodies."""

from pipeline.config.analyze import AnalyzeConfig, VerifyConfig
from pipeline.config.sections import (
    BatchConfig,
    CatalogConfig,
    ClusterConfig,
    CorpusConfig,
    MasksConfig,
    ModelConfig,
    RankingConfig,
    SaeConfig,
    SamplingConfig,
    Section,
    StoreConfig,
)

__all__ = [
    "AnalyzeConfig",
    "BatchConfig",
    "CatalogConfig",
    "ClusterConfig",
    "CorpusConfig",
    "MasksConfig",
    "ModelConfig",
    "RankingConfig",
    "SaeConfig",
    "SamplingConfig",
    "Section",
    "StoreConfig",
    "VerifyConfig",
]
