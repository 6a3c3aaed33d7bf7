"""SAE Census: corpus statistics of sparse-autoencoder features.

What notebooks use is exported here; names are imported when first used, so that `import pipeline` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.compute.edits import Edit
    from pipeline.config import (
        AblateConfig,
        AnalyzeConfig,
        CompareConfig,
        DirectLogitAttributorConfig,
        FeatureAnalyzerConfig,
        SteerConfig,
    )
    from pipeline.flows.ablate import ablate
    from pipeline.flows.analyze import analyze
    from pipeline.flows.catalog import Catalog
    from pipeline.flows.compare import compare
    from pipeline.flows.feature_analyzer import FeatureAnalyzer
    from pipeline.flows.interpretable import InterpretableModel
    from pipeline.flows.linearized import analyze_linearized_feature
    from pipeline.flows.observe import (
        FeatureRanking,
        PromptCodes,
        SetSums,
        capture_residual,
        differential_features,
        encode_prompts,
        fire_rate,
        observe_prompts,
        pretty_ranking,
        scan_prompts_for_feature,
        top_features_for_prompt,
    )
    from pipeline.flows.steer import steer
    from pipeline.flows.token_tables import make_token_df, save_linearized
    from pipeline.flows.trace import trace_feature
    from pipeline.io.centring import center_writing_weights
    from pipeline.io.checkpoints import load_sae
    from pipeline.io.checkpoints.nanochat import load_saes, save_sae
    from pipeline.io.model import LanguageModel
    from pipeline.steps.logits import DirectLogitAttributor
    from pipeline.types import HookPoint

__all__ = [
    "AblateConfig",
    "AnalyzeConfig",
    "Catalog",
    "CompareConfig",
    "DirectLogitAttributor",
    "DirectLogitAttributorConfig",
    "Edit",
    "FeatureAnalyzer",
    "FeatureAnalyzerConfig",
    "FeatureRanking",
    "HookPoint",
    "InterpretableModel",
    "LanguageModel",
    "PromptCodes",
    "SetSums",
    "SteerConfig",
    "ablate",
    "analyze",
    "analyze_linearized_feature",
    "capture_residual",
    "center_writing_weights",
    "compare",
    "differential_features",
    "encode_prompts",
    "fire_rate",
    "load_sae",
    "load_saes",
    "make_token_df",
    "observe_prompts",
    "pretty_ranking",
    "save_linearized",
    "save_sae",
    "scan_prompts_for_feature",
    "steer",
    "top_features_for_prompt",
    "trace_feature",
]

_HOMES = {
    "AblateConfig": "pipeline.config",
    "AnalyzeConfig": "pipeline.config",
    "Catalog": "pipeline.flows.catalog",
    "CompareConfig": "pipeline.config",
    "DirectLogitAttributor": "pipeline.steps.logits",
    "DirectLogitAttributorConfig": "pipeline.config",
    "Edit": "pipeline.compute.edits",
    "FeatureAnalyzer": "pipeline.flows.feature_analyzer",
    "FeatureAnalyzerConfig": "pipeline.config",
    "FeatureRanking": "pipeline.flows.observe",
    "HookPoint": "pipeline.types",
    "InterpretableModel": "pipeline.flows.interpretable",
    "LanguageModel": "pipeline.io.model",
    "PromptCodes": "pipeline.flows.observe",
    "SetSums": "pipeline.flows.observe",
    "SteerConfig": "pipeline.config",
    "ablate": "pipeline.flows.ablate",
    "analyze": "pipeline.flows.analyze",
    "analyze_linearized_feature": "pipeline.flows.linearized",
    "capture_residual": "pipeline.flows.observe",
    "center_writing_weights": "pipeline.io.centring",
    "compare": "pipeline.flows.compare",
    "differential_features": "pipeline.flows.observe",
    "encode_prompts": "pipeline.flows.observe",
    "fire_rate": "pipeline.flows.observe",
    "load_sae": "pipeline.io.checkpoints",
    "load_saes": "pipeline.io.checkpoints.nanochat",
    "make_token_df": "pipeline.flows.token_tables",
    "observe_prompts": "pipeline.flows.observe",
    "pretty_ranking": "pipeline.flows.observe",
    "save_linearized": "pipeline.flows.token_tables",
    "save_sae": "pipeline.io.checkpoints.nanochat",
    "scan_prompts_for_feature": "pipeline.flows.observe",
    "steer": "pipeline.flows.steer",
    "top_features_for_prompt": "pipeline.flows.observe",
    "trace_feature": "pipeline.flows.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
