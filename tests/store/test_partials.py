"""The schema of partials and nodes holds for real ones, and what does not fit it is refused by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sae_census.config import AnalyzeConfig
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.compact import compact
from sae_census.io.store import partials
from sae_census.io.store.zarr_files import Pack
from sae_census.records import Node, Receipt

Arrays = dict[str, np.ndarray]


def arrays_of(path: Path) -> Arrays:
    """Every array of a pack, by another road than the schema."""
    with Pack(path) as pack:
        return {name: np.asarray(array[...]) for name, array in pack._root.arrays()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., AnalyzeConfig]) -> Path:
    """With partials that keep all codes, and nodes."""
    root = tmp_path_factory.mktemp("store")
    analyze(analyze_config(root, codes="keep"), lambda line: None)
    compact(root, "default", say=lambda line: None)
    return root


@pytest.fixture(scope="module")
def partial(store: Path) -> Arrays:
    path = min(store.glob("measures/*/receipts/*.json"))
    return arrays_of(store / Receipt.read(path.read_bytes(), str(path)).partial.key)


@pytest.fixture(scope="module")
def node(store: Path) -> Arrays:
    path = min(store.glob("measures/*/nodes/*.json"))
    return arrays_of(store / Node.read(path.read_bytes(), str(path)).merged.key)


def test_a_partial_and_a_node_hold_the_arrays_of_the_schema_and_no_other(partial: Arrays, node: Arrays) -> None:
    partials.check(partial, is_node=False)
    partials.check(node, is_node=True)
    by_nodes = {field.name for field in partials.PARTIAL if field.held == "by nodes"}
    assert partial.keys() | by_nodes == {field.name for field in partials.PARTIAL}
    assert by_nodes <= node.keys()
    assert not by_nodes & partial.keys()


@pytest.mark.parametrize("name", [field.name for field in partials.PARTIAL if field.held == "always"])
def test_an_array_that_is_missing_or_of_another_kind_is_refused_by_name(partial: Arrays, name: str) -> None:
    without = {key: array for key, array in partial.items() if key != name}
    other = partial[name]
    for wrong in (without, without | {name: other.astype(np.int16)}, without | {name: other[None]}):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            partials.pack(wrong, {})


def test_lengths_that_do_not_fit_together_are_refused(partial: Arrays) -> None:
    with pytest.raises(ValueError, match=r"has shape .*; expected \(P(\+1)?\) with P = "):
        partials.check(partial | {"code_start": partial["code_start"][:-1]}, is_node=False)


def test_an_array_that_nobody_knows_is_refused(partial: Arrays) -> None:
    with pytest.raises(ValueError, match=r"^the array extra is none that"):
        partials.check(partial | {"extra": np.zeros(1)}, is_node=False)
    with pytest.raises(ValueError, match=r"^the array top_shard is none that io\.store\.partials knows of a partial$"):
        partials.check(partial | {"top_shard": partial["top_row"]}, is_node=False)
