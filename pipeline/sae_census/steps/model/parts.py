"""Model and tokenizer as a config names them, and the proof that they are those that a run was planned with.

Between the look of the driver and the start of a worker, files may be swapped. So digests travel with the settings,
and a worker compares what it has loaded, hashed after it was loaded, before it does anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sae_census.config import ModelConfig
from sae_census.errors import IdentityError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Digests of the parts that something is planned or was made with."""

    model: str
    tokenizer: str
    saes: Mapping[str, str]
    """By site."""
    of: str = ""
    """What was made with them, as `catalog demo`; empty: the run that is under way."""

    @classmethod
    def of_measure(cls, measure: Mapping[str, Any], of: str = "") -> "Provenance":
        """What the identity of a run or a catalog says, by its `measure` fields."""
        about = measure["model"]
        return cls(model=about["digest"], tokenizer=about["tokenizer"], saes=dict(measure["saes"]), of=of)

    def prove_model(self, name: str, digest: str) -> None:
        """Raises IdentityError if the loaded model is another one."""
        self._prove(f"model {name}", digest, self.model)

    def prove_tokenizer(self, name: str, tokenizer: Tokenizer) -> None:
        """Raises IdentityError if the loaded tokenizer is another one."""
        self._prove(f"the tokenizer of {name}", tokenizer.digest_as(self.tokenizer), self.tokenizer)

    def prove_saes(self, digests: Mapping[str, str]) -> None:
        """Raises IdentityError if one of the SAEs is not among the loaded ones, by site, or is another one."""
        for site, then in self.saes.items():
            self._prove(f"SAE {site}", digests.get(site, "none"), then)

    def _prove(self, what: str, now: str, then: str) -> None:
        if now == then:
            return
        if self.of:
            raise IdentityError(
                f"{what} is not the one that {self.of} was made with (digest {now[:12]}, then {then[:12]}); put "
                "the old one back, or analyse again under another name"
            )
        raise IdentityError(
            f"{what} was changed while this run was under way (digest {now[:12]}, planned {then[:12]}); let its "
            "files be, and run the same command again"
        )
