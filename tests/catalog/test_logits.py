"""Direct logits: tiles say what dense float64 says, weights what the model's modules say, tables what both say."""

import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from conftest import Cli
from test_hooks import LAYOUTS, NUM_LAYERS, TINY, Layout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from sae_census import Catalog, DirectLogitAttributor, DirectLogitAttributorConfig, LanguageModel, load_sae
from sae_census.compute.numbers.logits import DEFINITIONS, FinalNorm, LogitEffects, Unembedding, logit_effects
from sae_census.config import AttributeConfig, LogitsConfig, VerifyConfig
from sae_census.errors import CheckpointError, ConfigError, CorruptError, IdentityError
from sae_census.flows.catalog.attribute import attribute
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.verify import verify
from sae_census.io.model import families
from sae_census.io.model.families import FAMILIES
from sae_census.io.model.hooks import find_blocks
from sae_census.io.model.unembedding import read_unembedding, read_writing
from sae_census.io.store import tables
from sae_census.steps.census.logits import LogitSettings, LogitWorker, top_tokens
from sae_census.steps.census.partial import RangeTask
from sae_census.steps.model.provenance import Provenance
from sae_census.types import HookPoint, SiteKey

D, V = 16, 64
MODES = ("direction", "ln_final")
KINDS = ("layer_norm", "rms_norm")
COLUMNS = LogitEffects.__slots__


# The mathematics


def random_unembedding(kind: str, *, num_tokens: int = V, seed: int = 0) -> Unembedding:
    g = torch.Generator().manual_seed(seed)
    gain, bias = torch.rand(D, generator=g) + 0.5, torch.randn(D, generator=g)
    norm = FinalNorm(kind=kind, gain=gain, bias=bias if kind == "layer_norm" else None, eps=1e-5)
    weight = torch.randn(num_tokens, D, generator=g) + torch.randn(D, generator=g)  # its mean row is not zero
    return Unembedding(norm=norm, weight=weight, bias=torch.randn(num_tokens, generator=g) + 40)


def random_rows(num: int, seed: int = 1) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def dense(rows: Tensor, u: Unembedding, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """All logits (F, V) in float64, written down a second time, and what direction mode takes away."""
    x, w, gain = rows.double().numpy(), u.weight.double().numpy(), u.norm.gain.double().numpy()
    if u.norm.kind == "layer_norm":
        x = x - x.mean(axis=1, keepdims=True)
    if mode == "direction":
        logits = (x * gain) @ w.T
        return logits - logits.mean(axis=1, keepdims=True), logits.mean(axis=1)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + u.norm.eps) * gain
    if u.norm.bias is not None:
        x = x + u.norm.bias.double().numpy()
    logits = x @ w.T + u.bias.double().numpy()
    return logits, logits.mean(axis=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_say_what_dense_float64_says(kind, mode):
    u, rows = random_unembedding(kind), random_rows(23)
    found = logit_effects(rows, u, top_k=5, mode=mode, tile_features=7, tile_tokens=11)
    logits, mean = dense(rows, u, mode)
    descending, ascending = np.argsort(-logits, axis=1)[:, :5], np.argsort(logits, axis=1)[:, :5]
    np.testing.assert_array_equal(found.positive_token, descending)
    np.testing.assert_array_equal(found.negative_token, ascending)
    for token, logit in ((descending, found.positive_logit), (ascending, found.negative_logit)):
        np.testing.assert_allclose(logit, np.take_along_axis(logits, token, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.std, logits.std(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.skewness, scipy.stats.skew(logits, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.kurtosis, scipy.stats.kurtosis(logits, axis=1), rtol=1e-4, atol=1e-4)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("mode", MODES)
def test_any_tiles_give_the_same_bits_and_ties_go_to_the_lowest_token_id(mode):
    """On numbers that float32 adds exactly, so that only the bookkeeping of tiles is on trial."""
    # Rows of one length, so that RMSNorm divides all by 2; a mean row over 64 tokens is exact.
    rows = torch.stack([row.roll(i) for i, row in enumerate(torch.tensor([4.0, -4, 4, 4, *[0] * 12]).expand(9, D))])
    norm = FinalNorm(kind="rms_norm", gain=torch.full((D,), 0.5), eps=0.0)
    u = Unembedding(norm=norm, weight=whole_numbers(V, D, seed=5), bias=whole_numbers(V, seed=6))
    whole = logit_effects(rows, u, top_k=20, mode=mode)
    for tile_features in (1, 4, 9):
        for tile_tokens in (1, 3, 20, 21, 63, 64, 100):
            tiled = logit_effects(rows, u, top_k=20, mode=mode, tile_features=tile_features, tile_tokens=tile_tokens)
            for name in COLUMNS[:4]:
                np.testing.assert_array_equal(getattr(tiled, name), getattr(whole, name), err_msg=name)
            for name in COLUMNS[4:]:
                np.testing.assert_allclose(
                    getattr(tiled, name), getattr(whole, name), rtol=1e-5, atol=1e-6, err_msg=name
                )
    x = rows.double().numpy() * (0.5 if mode == "direction" else 0.25)
    logits = x @ u.weight.double().numpy().T + (u.bias.double().numpy() if mode == "ln_final" else 0)
    assert len(np.unique(logits)) < logits.size / 4  # there are ties to decide
    order = np.lexsort((np.tile(np.arange(V), (9, 1)), -logits))
    np.testing.assert_array_equal(whole.positive_token, order[:, :20])
    order = np.lexsort((np.tile(np.arange(V), (9, 1)), logits))
    np.testing.assert_array_equal(whole.negative_token, order[:, :20])


def test_a_range_of_whole_tiles_gives_the_bits_of_the_whole():
    u, rows = random_unembedding("rms_norm"), random_rows(40)
    whole = logit_effects(rows, u, top_k=3, tile_features=8)
    part = logit_effects(rows[16:32], u, top_k=3, tile_features=8)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[16:32], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_softmax_or_the_norm_cannot_see_moves_no_effect(kind):
    u, rows = random_unembedding(kind), random_rows(8)
    base = logit_effects(rows, u, top_k=6)

    def same(other: LogitEffects) -> None:
        np.testing.assert_array_equal(other.positive_token, base.positive_token)
        for name in ("positive_logit", "negative_logit", "std", "skewness", "kurtosis"):
            np.testing.assert_allclose(getattr(other, name), getattr(base, name), rtol=1e-3, atol=1e-4)

    same(logit_effects(rows, replace(u, weight=u.weight + 3 * random_rows(1, seed=9)), top_k=6))  # every logit alike
    same(logit_effects(rows, replace(u, bias=None), top_k=6))
    if kind == "layer_norm":
        same(logit_effects(rows + 5, u, top_k=6))
    double = logit_effects(2 * rows, u, top_k=6)
    np.testing.assert_array_equal(double.positive_logit, 2 * base.positive_logit)
    np.testing.assert_array_equal(double.std, 2 * base.std)
    np.testing.assert_array_equal(double.kurtosis, base.kurtosis)


def test_moments_keep_their_digits_far_from_zero():
    u, rows = random_unembedding("layer_norm", num_tokens=5000), random_rows(6)
    far = replace(u, bias=u.bias + 1000)
    near = replace(u, bias=u.bias - 40)
    found = logit_effects(rows, far, top_k=1, mode="ln_final", tile_tokens=100)
    logits, _ = dense(rows, near, "ln_final")
    np.testing.assert_allclose(found.mean, logits.mean(axis=1) + 1040, rtol=1e-9)
    np.testing.assert_allclose(found.std, logits.std(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.kurtosis, scipy.stats.kurtosis(logits, axis=1), atol=1e-4)


def test_a_direction_that_says_nothing_has_flat_logits():
    found = logit_effects(torch.zeros(1, D), random_unembedding("rms_norm"), top_k=3)
    assert found.positive_token.tolist() == found.negative_token.tolist() == [[0, 1, 2]]
    assert [float(getattr(found, name)[0]) for name in ("mean", "std", "skewness", "kurtosis")] == [0, 0, 0, 0]


@pytest.mark.parametrize("top_k", [0, V + 1])
def test_more_tokens_than_there_are_is_refused(top_k):
    with pytest.raises(ConfigError, match=rf"^top_k is {top_k}, but expected 1 to {V}, the number of tokens"):
        logit_effects(random_rows(1), random_unembedding("rms_norm"), top_k=top_k)


def test_all_tokens_may_be_asked_for():
    found = logit_effects(random_rows(2), random_unembedding("rms_norm"), top_k=V, tile_tokens=10)
    np.testing.assert_array_equal(found.positive_token, found.negative_token[:, ::-1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["decoder", "unembedding"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_is_refused(where, value, mode):
    u, rows = random_unembedding("layer_norm"), random_rows(4)
    rows[2, 3] = value if where == "decoder" else rows[2, 3]
    u.weight[7, 1] = value if where == "unembedding" else u.weight[7, 1]
    first = 2 if where == "decoder" else 0
    with pytest.raises(CheckpointError, match=f"^the logits of direction {first} of 4 are NaN or infinite; expected"):
        logit_effects(rows, u, top_k=2, mode=mode)


class LargestTensor(TorchDispatchMode):
    """Watches how large the tensors are that operations give; what they were given does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_larger_than_a_tile_is_ever_made(mode, dtype):
    num_features, num_tokens, tile_features, tile_tokens, top_k = 512, 1024, 64, 64, 4
    u = random_unembedding("layer_norm", num_tokens=num_tokens)
    u = replace(u, weight=u.weight.to(dtype))
    rows = random_rows(num_features)
    with LargestTensor() as seen:
        logit_effects(rows, u, top_k=top_k, mode=mode, tile_features=tile_features, tile_tokens=tile_tokens)
    tile, result = 4 * tile_features * tile_tokens, 8 * num_features * top_k
    assert seen.num_bytes == max(tile, result)
    assert seen.num_bytes < 4 * num_features * num_tokens / 100


# The model's modules


class Head(NamedTuple):
    """A random causal model of one family."""

    layout: Layout
    model: Any
    final_norm: nn.Module
    blocks: nn.ModuleList

    def logits(self, stream: Tensor) -> Tensor:
        """The real final norm and head on vectors of the residual stream."""
        return self.model.get_output_embeddings()(self.final_norm(stream))


def streams_of(head: Head) -> set[str]:
    return set(families.family_of(head.model.config.get_text_config().model_type).streams)


def build_head(name: str) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gemma3":
            layout = LAYOUTS["gemma3_text"]
            vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
            text = TINY | layout.config
            config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
        else:
            layout = LAYOUTS[name]
            config = AutoConfig.for_model(name.split()[0], **TINY, **layout.config)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.4)
    base = model.base_model.language_model if name == "gemma3" else model.base_model
    model.requires_grad_(False)
    return Head(layout, model, base.get_submodule(layout.final_norm), find_blocks(model.base_model, NUM_LAYERS))


@pytest.fixture(scope="module", params=[*(name for name in LAYOUTS if name != "nanochat"), "gemma3"])
def head(request: pytest.FixtureRequest) -> Head:
    return build_head(request.param)


def whole_table(found: LogitEffects) -> np.ndarray:
    """Logits (F, V) from effects whose top_k is V."""
    table = np.empty(found.positive_logit.shape, np.float32)
    np.put_along_axis(table, found.positive_token, found.positive_logit, axis=1)
    return table


def test_every_family_of_the_hooks_has_a_final_norm():
    assert (
        {name for name, family in FAMILIES.items() if family.final_norm}
        == set(FAMILIES) - {"nanochat"}
        == {name.split()[0] for name in (*LAYOUTS, "gemma3")} - {"nanochat"}
    )


def test_ln_final_is_the_models_own_norm_and_head_on_the_decoder_row(head):
    rows, num_tokens = random_rows(6), TINY["vocab_size"]
    found = logit_effects(rows, read_unembedding(head.model, num_tokens), top_k=num_tokens, mode="ln_final")
    np.testing.assert_allclose(whole_table(found), head.logits(rows).numpy(), rtol=1e-4, atol=1e-4)


def test_direction_is_the_derivative_of_the_models_own_norm_and_head(head):
    """Along directions that do not change the length of the stream, times that length, up to a constant."""
    rows, num_tokens = random_rows(6), TINY["vocab_size"]
    unembedding = read_unembedding(head.model, num_tokens)
    stream = random_rows(1, seed=4).double()
    head.model.double()
    centred = stream - stream.mean() if unembedding.norm.kind == "layer_norm" else stream
    across = rows.double() - (rows.double() @ centred.T) / centred.square().sum() * centred
    # GemmaRMSNorm and its kin compute in float32 whatever they are given
    step = 1e-2
    slope = torch.stack([head.logits(stream + step * d) - head.logits(stream - step * d) for d in across])[:, 0]
    head.model.float()
    slope = slope * centred.square().mean().sqrt() / (2 * step)
    found = whole_table(logit_effects(across.float(), unembedding, top_k=num_tokens))
    np.testing.assert_allclose(found, (slope - slope.mean(dim=1, keepdim=True)).numpy(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("stream", ["attn_z", "mlp_post"])
def test_inner_streams_are_written_as_the_models_own_output_matrix_writes_them(head, stream):
    if stream not in streams_of(head):  # mixtures of experts and linear attention lack some
        return
    for layer in range(NUM_LAYERS):
        block, layout = head.blocks[layer], head.layout
        path, norm = (layout.to_out, layout.norm_of_attn) if stream == "attn_z" else (
            f"mlp.{layout.down}", layout.norm_of_mlp)  # fmt: skip
        module = block.get_submodule(path)
        writing = read_writing(head.model, HookPoint(layer, stream))
        directions = torch.randn(5, len(writing.matrix), generator=torch.Generator().manual_seed(layer))
        expected = module(directions) - module(torch.zeros_like(directions))
        if norm:
            length = (expected.square().mean(dim=1, keepdim=True) + block.get_submodule(norm).eps).sqrt()
            expected = block.get_submodule(norm)(expected) * length
        torch.testing.assert_close(writing.rows(directions), expected, rtol=1e-4, atol=1e-4)


def test_other_streams_are_written_as_they_are(head):
    rows = random_rows(3)
    streams = ["resid_pre", "resid_post", "attn_out", "mlp_out", *(["resid_mid"] if not head.layout.parallel else [])]
    for stream in streams:
        if stream not in streams_of(head):
            continue
        assert torch.equal(read_writing(head.model, HookPoint(1, stream)).rows(rows), rows)


def test_padding_of_the_unembedding_is_left_out(head):
    unembedding = read_unembedding(head.model, 20)
    found = logit_effects(random_rows(4), unembedding, top_k=20, mode="ln_final")
    np.testing.assert_allclose(whole_table(found), head.logits(random_rows(4))[:, :20].numpy(), rtol=1e-4, atol=1e-4)


def test_the_input_of_an_mlp_has_no_direct_logits():
    with pytest.raises(ConfigError, match=r"^blocks\.1\.mlp\.hook_in has no direct logits: .* choose an SAE of resid_"):
        read_writing(build_head("llama").model, HookPoint(1, "mlp_in"))


def test_a_model_without_a_head_is_refused():
    model = build_head("llama").model
    model.lm_head = nn.Identity()
    with pytest.raises(ConfigError, match=r"^this llama model has no unembedding matrix; expected a causal"):
        read_unembedding(model, 32)


# The class for notebooks


@pytest.fixture(scope="module")
def model(model_dir: Path) -> LanguageModel:
    return LanguageModel(str(model_dir), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("mode", MODES)
def test_the_documented_call_lists_tokens_and_logits_of_every_feature(model, sae_dirs, mode):
    sae = load_sae(str(sae_dirs["late"]))
    found = DirectLogitAttributor(DirectLogitAttributorConfig(top_k=4, mode=mode)).direct_logit_attribute(sae, model)
    stream = sae.sae.w_dec
    if mode == "ln_final":
        logits = model.inner.lm_head(model.inner.model.norm(stream))
    else:
        logits = (stream * model.inner.model.norm.weight) @ model.inner.lm_head.weight.T
    logits = logits[:, : model.tokenizer.size]
    if mode == "direction":
        logits = logits - logits.mean(dim=1, keepdim=True)
    assert len(found) == 96
    for row, feature in zip(logits, found, strict=True):
        assert feature.keys() == {"top_positive", "top_negative"}
        for name, largest in (("top_positive", True), ("top_negative", False)):
            best = row.topk(4, largest=largest)
            assert [entry["token"] for entry in feature[name]] == model.tokenizer.tokens(best.indices.tolist())
            assert [entry["logit"] for entry in feature[name]] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_the_class_has_the_documented_defaults():
    assert DirectLogitAttributorConfig().model_dump() == {"top_k": 10, "clt_layer": None, "mode": "direction"}


def test_unsupported_saes_are_not_implemented(model):
    attributor = DirectLogitAttributor(DirectLogitAttributorConfig())
    with pytest.raises(NotImplementedError, match=r"^direct logit attribution of Linear is not supported; expected"):
        attributor.direct_logit_attribute(nn.Linear(2, 2), model)


def test_a_layer_that_is_not_the_saes_is_refused(model, sae_dirs):
    sae = load_sae(str(sae_dirs["late"]))
    attributor = DirectLogitAttributor(DirectLogitAttributorConfig(top_k=1))
    assert attributor.direct_logit_attribute(sae, model, layer_idx=1) == attributor.direct_logit_attribute(sae, model)
    with pytest.raises(
        ConfigError, match=r"^layer_idx is 0, but SAE late is no cross-layer transcoder: it is at blocks\.1"
    ):
        attributor.direct_logit_attribute(sae, model, layer_idx=0)
    with pytest.raises(ConfigError, match=r"^clt_layer is 2, but SAE late"):
        DirectLogitAttributor(DirectLogitAttributorConfig(clt_layer=2)).direct_logit_attribute(sae, model)


def test_an_sae_of_another_width_is_refused(model, sae_dirs):
    sae = replace(load_sae(str(sae_dirs["late"])), hook_point=HookPoint(1, "mlp_post"))
    with pytest.raises(ConfigError, match=r"^the decoder of SAE late is 32 wide, but what it writes at .* is 48 wide"):
        DirectLogitAttributor(DirectLogitAttributorConfig()).direct_logit_attribute(sae, model)


# Tables, catalogs, the job


def quietly(line: str) -> None:
    """Nobody listens."""


ATTRIBUTED = {"logits": {"top_k": 5}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, analyze_config) -> Catalog:
    """A catalog without logits."""
    return analyze(analyze_config(tmp_path_factory.mktemp("plain")), quietly).catalog


@pytest.fixture
def copied(plain, tmp_path) -> Catalog:
    """The same in a store of one's own."""
    shutil.copytree(plain.folder.parents[2], tmp_path, dirs_exist_ok=True)
    return Catalog(tmp_path)


@pytest.fixture(scope="module")
def catalog(plain, tmp_path_factory, analyze_config) -> Catalog:
    """What an analysis that asks for logits publishes over the same partials."""
    root = tmp_path_factory.mktemp("attributed")
    shutil.copytree(plain.folder.parents[2], root, dirs_exist_ok=True)
    return analyze(analyze_config(root, **ATTRIBUTED), quietly).catalog


def attribute_config(catalog: Catalog, **overrides: Any) -> AttributeConfig:
    sections = {
        "store": {"root": str(catalog.folder.parents[2])},
        "catalog": {"name": "default"},
        "logits": ATTRIBUTED["logits"],
        "model": {"device": "cpu"},
        "cluster": {"executor": "inline", "threads_per_worker": 1},
    }
    return AttributeConfig(**(sections | overrides))


def test_the_tables_say_what_the_class_says(catalog, model, sae_dirs):
    rows = pq.read_table(catalog.folder / "logits.parquet").to_pylist()
    attributor = DirectLogitAttributor(DirectLogitAttributorConfig(top_k=5))
    assert len(rows) == (64 + 96) * 10
    for name, point in (("early", "blocks.0.hook_resid_post"), ("late", "blocks.1.hook_resid_post")):
        for feature, listed in enumerate(attributor.direct_logit_attribute(load_sae(str(sae_dirs[name])), model)):
            mine = [r for r in rows if (r["hook_point"], r["sae"], r["feature_id"]) == (point, name, feature)]
            for sign in ("positive", "negative"):
                found = [{"token": r["token"], "logit": r["logit"]} for r in mine if r["sign"] == sign]
                assert found == listed[f"top_{sign}"]
                ids = [r["token_id"] for r in mine if r["sign"] == sign]
                assert model.tokenizer.tokens(ids) == [entry["token"] for entry in found]
            assert catalog.logits(point, name, feature).to_pylist() == mine


def test_the_tables_are_sorted_by_key_with_the_binding_columns(catalog):
    key = ["hook_point: string", "sae: string", "feature_id: int32"]
    found = pq.ParquetFile(catalog.folder / "logits.parquet")
    assert [f"{field.name}: {field.type}" for field in found.schema_arrow] == [
        *key, "sign: string", "rank: int32", "token_id: int32", "token: string", "logit: float",
    ]  # fmt: skip
    rows = found.read().to_pylist()
    order = [(r["hook_point"], r["sae"], r["feature_id"], r["sign"], r["rank"]) for r in rows]
    assert order == sorted(set(order))
    assert {r["rank"] for r in rows} == {1, 2, 3, 4, 5}
    assert all(found.metadata.row_group(i).column(2).is_stats_set for i in range(found.num_row_groups))
    moments = catalog.logit_moments
    assert [f"{field.name}: {field.type}" for field in moments.schema] == [
        *key, "mean: double", "std: double", "skewness: double", "kurtosis: double",
    ]  # fmt: skip
    keys = ["hook_point", "sae", "feature_id"]
    assert moments.select(keys).equals(catalog.features.select(keys))


def test_the_manifest_defines_the_logits(catalog, model):
    size = model.tokenizer.size
    assert catalog.manifest.logits is not None
    assert catalog.manifest.logits.content() == {
        "top_k": 5,
        "mode": "direction",
        "definition": DEFINITIONS["direction"],
        "num_tokens": size,
        "num_padding": model.inner.lm_head.out_features - size,
    }


def test_the_strongest_tokens_of_a_range_can_be_joined(catalog):
    site = SiteKey(HookPoint(1, "resid_post"), "late")
    texts = top_tokens(catalog.folder, site, 30, 50)
    assert len(texts) == 20
    for feature, found in enumerate(texts, start=30):
        rows = catalog.logits(str(site.hook_point), site.sae, feature).to_pylist()
        assert found == [row["token"] for row in rows if row["sign"] == "positive"]


def test_attributing_a_catalog_gives_the_snapshot_of_an_analysis_that_asked_for_logits(
    catalog, copied, tmp_path, analyze_config
):
    plain = copied
    assert plain.digest != catalog.digest
    with pytest.raises(ConfigError, match=r"^snapshot 1 of catalog 'default' has no logits; run sae-census attribute"):
        plain.logits("blocks.1.hook_resid_post", "late", 0)
    first = attribute(attribute_config(plain), quietly)
    attributed = Catalog(tmp_path)
    assert (first.is_new, attributed.number, attributed.digest) == (True, 2, catalog.digest)
    assert attributed.folder == first.folder
    assert not attribute(attribute_config(plain), quietly).is_new
    assert not analyze(analyze_config(tmp_path, **ATTRIBUTED), quietly).is_new
    other = attribute(attribute_config(plain, logits=LogitsConfig(top_k=2, mode="ln_final")), quietly)
    newest = Catalog(tmp_path)
    assert (other.is_new, newest.number, newest.manifest.logits.mode) == (True, 3, "ln_final")
    assert newest.logits("blocks.1.hook_resid_post", "late", 0).num_rows == 4
    assert newest.features.equals(plain.features)
    verdict = verify(VerifyConfig(store={"root": str(tmp_path)}))
    assert verdict.wrong == ()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_other_saes_than_the_catalogs_are_refused(catalog, sae_dirs):
    saes = [{"path": str(sae_dirs["late"]), "name": "early", "hook_point": "blocks.0.hook_resid_post"}]
    message = r"^SAE blocks\.0\.hook_resid_post/early is not the one that catalog 'default' was made with"
    with pytest.raises(IdentityError, match=message):
        attribute(attribute_config(catalog, saes=saes), quietly)
    with pytest.raises(ConfigError, match=r"^model\.dtype is bfloat16, but the catalog was made in float32; leave"):
        attribute(attribute_config(catalog, model={"dtype": "bfloat16", "device": "cpu"}), quietly)


def test_a_catalog_never_grants_trust(catalog, monkeypatch):
    monkeypatch.setitem(catalog.manifest.config["model"], "trust_remote_code", True)
    monkeypatch.setattr("sae_census.flows.catalog.attribute.Catalog", lambda *_: catalog)
    seen = []
    monkeypatch.setattr(
        "sae_census.flows.catalog.attribute.facts_of", lambda model: seen.append(model.trust_remote_code)
    )
    with pytest.raises(AttributeError):
        attribute(attribute_config(catalog), quietly)
    assert seen == [False]


def test_a_damaged_snapshot_is_not_carried_on(copied, tmp_path):
    spans = copied.folder / "spans.parquet"
    body = bytearray(spans.read_bytes())
    body[len(body) // 2] ^= 1
    spans.write_bytes(body)
    with pytest.raises(CorruptError, match=r"spans\.parquet is damaged: run sae-census analyze again"):
        attribute(attribute_config(copied), quietly)
    assert Catalog(tmp_path).number == 1


def test_workers_and_their_results_travel_between_processes(catalog, model_dir, sae_dirs):
    config = catalog.manifest.config
    asked = AttributeConfig(model=config["model"], saes=config["saes"], logits=ATTRIBUTED["logits"])
    planned = Provenance.of_measures(catalog.measure)
    settings = LogitSettings(model=asked.model, saes=asked.saes, logits=asked.logits, threads=1, planned=planned)
    result = LogitWorker(pickle.loads(pickle.dumps(settings))).run(RangeTask(site=1, start=10, stop=12))
    rows = tables.from_ipc(pickle.loads(pickle.dumps(result)).logits).to_pylist()
    assert [row["logit"] for row in rows if row["feature_id"] == 11] == pytest.approx(
        catalog.logits("blocks.1.hook_resid_post", "late", 11)["logit"].to_pylist(), rel=1e-5
    )


@pytest.fixture
def run(cli: Cli, model_dir, sae_dirs) -> Cli:
    base = [
        f"model.id={model_dir}",
        "model.dtype=float32",
        f"saes=[{{path: {sae_dirs['late']}}}]",
        "cluster.threads_per_worker=1",
    ]

    return partial(cli, "attribute", *base)


# Hydra leaves the handling of its log files to the garbage collector
hydra = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@hydra
def test_the_job_writes_a_folder_without_a_catalog(run, tmp_path, catalog):
    code, out, err = run("logits.top_k=5")
    assert code == 0, err
    folder = tmp_path / "runs" / "logits"
    assert f"logits    {folder}\n" in out
    assert "late  by kurtosis of its logits" in out
    mine = pq.read_table(folder / "logits.parquet").to_pylist()
    assert mine == [r for r in pq.read_table(catalog.folder / "logits.parquet").to_pylist() if r["sae"] == "late"]
    assert run("logits.top_k=1", "out=elsewhere")[0] == 0
    assert pq.read_table(tmp_path / "elsewhere" / "logits.parquet").num_rows == 96 * 2


@hydra
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["logits.top_k=0"], "logits.top_k is 0; expected at least 1"),
        (["logits.top_k=5000"], "logits.top_k is 5000, but the tokenizer has only"),
        (["logits.mode=lens"], "logits.mode is 'lens': Input should be 'direction' or 'ln_final'"),
        (["saes=[{path: LATE, hook_point: blocks.1.mlp.hook_in}]"], "blocks.1.mlp.hook_in has no direct logits"),
        (["saes=[{path: LATE, hook_point: blocks.7.hook_resid_post}]"], "asks for layer 7, but the model has"),
        (["catalog.name=nowhere"], "there is no catalog 'nowhere'"),
        (["catalog.name=x", "out=y"], "catalog.name and out are two places for one result"),
        (["logits.topk=3"], "logits.topk is not known; did you mean logits.top_k?"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_and_exit_code_2(run, sae_dirs, overrides, sentence):
    code, _, err = run(*(text.replace("LATE", str(sae_dirs["late"])) for text in overrides))
    assert code == 2
    assert sentence in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_an_analysis_refuses_what_it_could_not_attribute_before_any_work(tmp_path, analyze_config, sae_dirs):
    saes = [{"path": str(sae_dirs["late"]), "hook_point": "blocks.1.mlp.hook_in"}]
    with pytest.raises(ConfigError, match="has no direct logits"):
        analyze(analyze_config(tmp_path, saes=saes, **ATTRIBUTED), quietly)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_on_ray_the_files_are_the_same(catalog, copied, tmp_path):
    cluster = {"executor": "ray", "workers": 1, "threads_per_worker": 1}
    assert attribute(attribute_config(copied, cluster=cluster), quietly).is_new
    assert Catalog(tmp_path).digest == catalog.digest
