"""SAE Census: corpus statistics of sparse-autoencoder features.

For notebooks: `analyze`, `AnalyzeConfig`, `Catalog`, `load_sae`, `HookPoint`, `FeatureAnalyzer`,
`FeatureAnalyzerConfig`. Names are imported when first used, so that `import pipeline` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import AnalyzeConfig, FeatureAnalyzerConfig
    from pipeline.flows.analyze import analyze
    from pipeline.flows.catalog import Catalog
    from pipeline.flows.feature_analyzer import FeatureAnalyzer
    from pipeline.io.checkpoints import load_sae
    from pipeline.types import HookPoint

__all__ = [
    "AnalyzeConfig",
    "Catalog",
    "FeatureAnalyzer",
    "FeatureAnalyzerConfig",
    "HookPoint",
    "analyze",
    "load_sae",
]

_HOMES = {
    "AnalyzeConfig": "pipeline.config",
    "Catalog": "pipeline.flows.catalog",
    "FeatureAnalyzer": "pipeline.flows.feature_analyzer",
    "FeatureAnalyzerConfig": "pipeline.config",
    "HookPoint": "pipeline.types",
    "analyze": "pipeline.flows.analyze",
    "load_sae": "pipeline.io.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
