"""SAE Census: corpus statistics of sparse-autoencoder features.

What notebooks use is exported here; names are imported when first used, so that `import sae_census` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_census.compute.effects.edits import Edit
    from sae_census.config import (
        AblateConfig,
        AnalyzeConfig,
        CompareConfig,
        DirectLogitAttributorConfig,
        FeatureAnalyzerConfig,
        SteerConfig,
    )
    from sae_census.flows.catalog.reader import Catalog
    from sae_census.flows.census.analyze import analyze
    from sae_census.flows.comparison.compare import compare
    from sae_census.flows.effects.ablate import ablate
    from sae_census.flows.effects.interpretable import InterpretableModel
    from sae_census.flows.effects.linearized import analyze_linearized_feature
    from sae_census.flows.effects.steer import steer
    from sae_census.flows.effects.token_tables import make_token_df, save_linearized
    from sae_census.flows.effects.trace import trace_feature
    from sae_census.flows.notebook.feature_analyzer import FeatureAnalyzer
    from sae_census.flows.notebook.observe import (
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
    from sae_census.io.checkpoints import load_sae
    from sae_census.io.checkpoints.directory import load_saes
    from sae_census.io.checkpoints.saving import save_sae
    from sae_census.io.model.centring import center_writing_weights
    from sae_census.io.model.language_model import LanguageModel
    from sae_census.steps.census.logits import DirectLogitAttributor
    from sae_census.types import HookPoint

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
    "AblateConfig": "sae_census.config",
    "AnalyzeConfig": "sae_census.config",
    "Catalog": "sae_census.flows.catalog.reader",
    "CompareConfig": "sae_census.config",
    "DirectLogitAttributor": "sae_census.steps.census.logits",
    "DirectLogitAttributorConfig": "sae_census.config",
    "Edit": "sae_census.compute.effects.edits",
    "FeatureAnalyzer": "sae_census.flows.notebook.feature_analyzer",
    "FeatureAnalyzerConfig": "sae_census.config",
    "FeatureRanking": "sae_census.flows.notebook.observe",
    "HookPoint": "sae_census.types",
    "InterpretableModel": "sae_census.flows.effects.interpretable",
    "LanguageModel": "sae_census.io.model.language_model",
    "PromptCodes": "sae_census.flows.notebook.observe",
    "SetSums": "sae_census.flows.notebook.observe",
    "SteerConfig": "sae_census.config",
    "ablate": "sae_census.flows.effects.ablate",
    "analyze": "sae_census.flows.census.analyze",
    "analyze_linearized_feature": "sae_census.flows.effects.linearized",
    "capture_residual": "sae_census.flows.notebook.observe",
    "center_writing_weights": "sae_census.io.model.centring",
    "compare": "sae_census.flows.comparison.compare",
    "differential_features": "sae_census.flows.notebook.observe",
    "encode_prompts": "sae_census.flows.notebook.observe",
    "fire_rate": "sae_census.flows.notebook.observe",
    "load_sae": "sae_census.io.checkpoints",
    "load_saes": "sae_census.io.checkpoints.directory",
    "make_token_df": "sae_census.flows.effects.token_tables",
    "observe_prompts": "sae_census.flows.notebook.observe",
    "pretty_ranking": "sae_census.flows.notebook.observe",
    "save_linearized": "sae_census.flows.effects.token_tables",
    "save_sae": "sae_census.io.checkpoints.saving",
    "scan_prompts_for_feature": "sae_census.flows.notebook.observe",
    "steer": "sae_census.flows.effects.steer",
    "top_features_for_prompt": "sae_census.flows.notebook.observe",
    "trace_feature": "sae_census.flows.effects.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
