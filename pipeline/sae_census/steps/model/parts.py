"""Model and tokenizer as a config names them."""

import torch

from sae_census.config import ModelConfig
from sae_census.io.model.device import choose_dtype
from sae_census.io.model.language_model import LanguageModel, ModelFacts, model_facts
from sae_census.io.tokens.tokenizer import Tokenizer


def facts_of(model: ModelConfig) -> ModelFacts:
    """What is known of a model by its config and files; they are hashed."""
    return model_facts(
        model.id,
        model.revision,
        trust_remote_code=model.trust_remote_code,
        center_writing_weights=model.center_writing_weights,
    )


def tokenizer_of(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model."""
    return Tokenizer(
        model.id,
        model.revision,
        trust_remote_code=model.trust_remote_code,
        fix_mistral_regex=model.fix_mistral_regex,
    )


def model_of(model: ModelConfig, device: torch.device) -> LanguageModel:
    """A model, loaded onto a device."""
    return LanguageModel(
        model.id,
        model.revision,
        dtype=choose_dtype(model.dtype, device),
        device=device,
        trust_remote_code=model.trust_remote_code,
        fix_mistral_regex=model.fix_mistral_regex,
        center_writing_weights=model.center_writing_weights,
    )
