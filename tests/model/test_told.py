"""What libraries say about correctness reaches the user, once; bars and advice do not."""

import json
import warnings
from logging import getLogger
from pathlib import Path

import pytest
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from sae_census.config import ModelConfig
from sae_census.io.loading import library_warnings
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.model.parts import tokenizer_of

SAID = "will lead to incorrect tokenization"


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A tokenizer as transformers 4 saved those of Mistral: more than 100,000 tokens, words split by a wrong rule."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(alphabet + [f"aB{n:06x}" for n in range(100_001)])}
    words["aB"] = len(words)
    backend = Backend(models.BPE(vocab=words, merges=[("a", "B")]))
    split = pre_tokenizers.Split(Regex(r"\p{L}+|[^\p{L}]+"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    config = {"model_type": "mistral", "transformers_version": "4.45.0", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_wrong_rule_of_mistral_is_told_once_and_mended_on_request(
    mistral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Tokenizer(str(mistral))
    Tokenizer(str(mistral))
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: ") and SAID in line for line in lines] == [True]
    assert any(SAID in line for line in library_warnings.passed_on())
    kept, mended = (tokenizer_of(ModelConfig(id=str(mistral), fix_mistral_regex=fix)) for fix in (False, True))
    assert capsys.readouterr().err == ""
    ids = [tokenizer.encode(["aBaB a12"])[0] for tokenizer in (old, kept, mended)]
    assert ids[0] == ids[1] != ids[2]
    assert old.digest == kept.digest != mended.digest


def test_a_model_passes_the_mending_on_to_its_tokenizer(model_dir: Path) -> None:
    import torch

    model = LanguageModel(str(model_dir), dtype=torch.float32, device=torch.device("cpu"), fix_mistral_regex=True)
    assert model.tokenizer.digest == tokenizer_of(ModelConfig(id=str(model_dir), fix_mistral_regex=True)).digest


def test_warnings_of_libraries_are_told_once_and_noise_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), library_warnings.captured():
        warnings.simplefilter("always")
        for name in ("transformers.some", "huggingface_hub.some", "datasets.some"):
            getLogger(name).warning("rows of %s are \x1b[31mwrong\x1b[0m\n  here", name)
            getLogger(name).warning("rows of %s are wrong here", name)
            getLogger(name).info("loading")
        warnings.warn("weights may be wrong", UserWarning, stacklevel=1)
        warnings.warn("rename your argument", FutureWarning, stacklevel=1)
        getLogger("transformers").warning("The fast path is not available because kernels are not installed")
    assert capsys.readouterr().err.splitlines() == [
        "warning: rows of transformers.some are wrong here",
        "warning: rows of huggingface_hub.some are wrong here",
        "warning: rows of datasets.some are wrong here",
        "warning: weights may be wrong",
    ]
