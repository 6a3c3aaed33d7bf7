"""Every exported name is documented in full, its example runs, and `docs/api.md` says what the docstrings say."""

import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from transformers import AutoTokenizer

import sae_census
from sae_census.flows.census.analyze import analyze

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = [name for name in sae_census.__all__ if inspect.isfunction(getattr(sae_census, name))]


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
    model_dir: Path,
    sae_dirs: dict[str, Path],
    analyze_config: MakeConfig,
) -> dict[str, Any]:
    """The names that the page says stand ready in every example."""
    root = tmp_path_factory.mktemp("store")
    analyze(analyze_config(root), say=lambda line: None)
    return {
        "torch": torch,
        "model_dir": str(model_dir),
        "model": sae_census.LanguageModel(str(model_dir), dtype=torch.float32, device=torch.device("cpu")),
        "tokenizer": AutoTokenizer.from_pretrained(model_dir),
        "sae_dir": str(sae_dirs["late"]),
        "saes_dir": sae_dirs["late"].parent,
        "sae": sae_census.load_sae(str(sae_dirs["late"])),
        "root": str(root),
        "catalog": sae_census.Catalog(root),
        "config": analyze_config(tmp_path_factory.mktemp("other"), saes=[{"path": str(sae_dirs["late"])}]),
    }


def documented(name: str) -> Iterator[tuple[str, str]]:
    """The docstrings of a name and, if it is a class, of its public methods."""
    found = getattr(sae_census, name)
    yield name, inspect.getdoc(found) or ""
    if inspect.isclass(found):
        for method, value in vars(found).items():
            if inspect.isfunction(value) and not method.startswith("_"):
                yield f"{name}.{method}", inspect.getdoc(value) or ""


@pytest.mark.parametrize("name", sae_census.__all__)
def test_the_example_of_an_exported_name_gives_what_it_says(name: str, shared: dict[str, Any], tmp_path: Path) -> None:
    exported = {other: getattr(sae_census, other) for other in sae_census.__all__}
    globs = exported | shared | {"folder": tmp_path}
    examples = [
        doctest.DocTestParser().get_doctest(text, dict(globs), where, None, 0) for where, text in documented(name)
    ]
    assert examples[0].examples, f"{name} has no example"
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for each in examples:
        runner.run(each, out=told.append)
    assert not runner.summarize(verbose=False).failed, "".join(told)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_each_parameter_and_what_it_returns(name: str) -> None:
    found = getattr(sae_census, name)
    text = inspect.getdoc(found) or ""
    parameters = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    named = set(re.findall(r"^    (\w+): ", parameters, re.MULTILINE))
    assert named == set(inspect.signature(found).parameters)
    gives = inspect.signature(found).return_annotation not in (None, "None")
    assert ("\nReturns:\n" in text) == gives


@pytest.mark.parametrize("name", sae_census.__all__)
def test_no_docstring_only_repeats_its_name(name: str) -> None:
    for where, text in documented(name):
        words = set(re.findall(r"[a-z]{3,}", text.partition(">>>")[0].lower()))
        repeated = set(re.findall(r"[a-z]{3,}", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", where).lower()))
        assert len(words - repeated - {"the", "config", "run", "job"}) >= 3, where


def test_the_page_of_the_api_is_what_the_docstrings_say() -> None:
    made = subprocess.run([sys.executable, ROOT / "scripts/api_page"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == made.stdout, "run scripts/api_page > docs/api.md"
