"""The cache of discovery: a hit runs nothing and changes nothing; damage, bounds and other processes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from discovery_bench import Bench, ask, bare, bench
from safetensors.torch import load_file, save_file

from sae_census.config import SaeConfig
from sae_census.io.model import generation
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.store.memo import ArrayCache


class Spy:
    """Counts forward passes and continuations."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.passes = self.continuations = 0

        def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                setattr(self, name, getattr(self, name) + 1)
                return inner(*args, **options)

            return call

        for method in ("run", "run_whole"):
            patch.setattr(LanguageModel, method, counted("passes", getattr(LanguageModel, method)))
        patch.setattr(generation, "generate", counted("continuations", generation.generate))

    def taken(self) -> tuple[int, int]:
        """(forward passes, continuations) since the last call."""
        counts = self.passes, self.continuations
        self.passes = self.continuations = 0
        return counts


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Spy:
    """With an empty cache of its own."""
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path / "cache"))
    return Spy(monkeypatch)


ASKED: dict[str, Any] = {
    "prompt": "river water stone", "gen_tokens": 10, "topk_tokens_per_seq": 5, "min_coverage_pct": 0.0,
    "do_sample": True, "seed": 5,
}  # fmt: skip


def test_a_hit_runs_nothing_and_gives_the_same_bytes(bench, spy):
    without = ask(bench.open(), **ASKED).model_dump_json()
    discoverer = bench.open(cache_mb=8)
    spy.taken()
    assert ask(discoverer, **ASKED).model_dump_json() == without
    assert spy.taken() == (1, 1)
    assert ask(discoverer, **ASKED).model_dump_json() == without
    assert spy.taken() == (0, 0)
    again = bench.open(cache_mb=8)
    spy.taken()
    assert ask(again, **ASKED).model_dump_json() == without
    ask(again, **ASKED | {"score_mode": "max", "return_top_x": 3, "layers": [1], "token_filter": "norm"})
    assert spy.taken() == (0, 0)


@pytest.mark.parametrize(
    ("change", "passes", "continuations"),
    [({"seed": 6}, 1, 1), ({"temperature": 0.7}, 1, 1), ({"do_sample": False}, 1, 1), ({"gen_tokens": 9}, 1, 1),
     ({"prompt": "river water ston"}, 1, 1)],
    ids=str,
)  # fmt: skip
def test_whatever_decides_tokens_is_part_of_the_key(change, passes, continuations, bench, bare, spy):
    discoverer = bench.open(cache_mb=8)
    ask(discoverer, **ASKED)
    spy.taken()
    changed = ask(discoverer, **ASKED | change)
    assert spy.taken() == (passes, continuations)
    assert changed == ask(bare, **ASKED | change)


def test_another_sae_under_the_same_name_is_a_miss_of_codes_only(bench, spy, sae_dirs, tmp_path):
    other = tmp_path / "other" / "late"
    shutil.copytree(sae_dirs["late"], other)
    weights = load_file(other / "sae_weights.safetensors")
    weights["W_enc"] = weights["W_enc"].flip(1).contiguous()
    save_file(weights, other / "sae_weights.safetensors")
    first = Bench(model=bench.model, saes=(SaeConfig(path=str(sae_dirs["late"])),))
    second = Bench(model=bench.model, saes=(SaeConfig(path=str(other)),))
    old = ask(first.open(cache_mb=8), **ASKED)
    cached = second.open(cache_mb=8)
    spy.taken()
    new = ask(cached, **ASKED)
    assert spy.taken() == (0, 0)
    assert new == ask(second.open(), **ASKED)
    assert new.features != old.features


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_another_model_or_dtype_is_a_miss(change, bench, spy, tmp_path):
    ask(bench.open(cache_mb=8), **ASKED)
    if change == "dtype":
        model = {"id": str(bench.model), "dtype": "bfloat16", "device": "cpu"}
    else:
        shutil.copytree(bench.model, tmp_path / "model")
        weights = load_file(tmp_path / "model" / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"] *= 1.5
        save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        model = {"id": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"}
    other = bench.open(cache_mb=8, model=model)
    spy.taken()
    answer = ask(other, **ASKED)
    assert spy.taken() == (1, 1)
    assert answer == ask(bench.open(model=model), **ASKED)


@pytest.mark.parametrize("damage", [
    lambda body: b"", lambda body: body[:20], lambda body: body[:-1], lambda body: body + b"x",
    lambda body: body[:50] + bytes([body[50] ^ 1]) + body[51:],
], ids=["empty", "head", "short", "long", "flipped"])  # fmt: skip
def test_a_damaged_entry_is_computed_again(damage, bench, spy, tmp_path):
    discoverer = bench.open(cache_mb=8)
    sound = ask(discoverer, **ASKED)
    files = sorted((tmp_path / "cache" / "discover").iterdir())
    bodies = [file.read_bytes() for file in files]
    for file, body in zip(files, bodies, strict=True):
        file.write_bytes(damage(body))
    spy.taken()
    assert ask(discoverer, **ASKED) == sound
    assert spy.taken() == (1, 1)
    assert ask(discoverer, **ASKED) == sound
    assert spy.taken() == (0, 0)
    assert [file.read_bytes() for file in files] == bodies


@pytest.mark.parametrize("place", ["file", "below_file", "read_only"])
def test_a_cache_that_cannot_be_written_is_no_cache(place, bench, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "read_only").mkdir(mode=0o500)
    where = {"file": "", "below_file": "file", "read_only": "read_only"}[place]
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path / where))
    if place == "file":
        (tmp_path / "discover").write_text("in the way")
    discoverer = bench.open(cache_mb=8)
    assert ask(discoverer, **ASKED) == ask(bench.open(), **ASKED)


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path):
    cache = ArrayCache(tmp_path / "cache", 20_000)
    for number in range(60):
        cache.put(number, {"x": np.full(100, number)})
        assert cache.get(0) is not None or number > 40, "used all the time"
        cache.get(0)
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= 20_000
    assert cache.get(59)["x"].tolist() == [59] * 100
    assert cache.get(3) is None
    cache.put("large", {"x": np.zeros(3000)})
    assert cache.get("large") is None
    assert (cache.hits, cache.misses) > (0, 0)


def test_a_cache_that_was_emptied_by_another_process_goes_on(tmp_path):
    cache = ArrayCache(tmp_path / "cache", 4_000)
    for number in range(10):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        cache.put(number, {"x": np.zeros(50)})
        assert cache.get(number) is not None


WRITER = """
import sys, numpy as np
from pathlib import Path
from sae_census.io.store.memo import ArrayCache
cache = ArrayCache(Path(sys.argv[1]), 60_000)
for number in range(300):
    cache.put(number % 40, {"x": np.full(200, number % 40)})
    found = cache.get((number * 7) % 40)
    assert found is None or (found["x"] == (number * 7) % 40).all()
"""


def test_processes_share_a_cache(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "cache")], cwd=Path(__file__).parents[2])
        for _ in range(2)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    cache = ArrayCache(tmp_path / "cache", 60_000)
    cache.put("one more", {"x": np.zeros(1)})
    files = list((tmp_path / "cache").iterdir())
    assert sum(file.stat().st_size for file in files) <= 60_000
    assert all(len(file.name) == 64 for file in files), "no draft is left"
    entries = [cache.get(number) for number in range(40)]
    assert any(entry is not None for entry in entries)
