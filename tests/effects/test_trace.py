"""Tracing: the parts of a pre-activation add up to it, each is what its ablation takes away, and the job keeps both."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from test_hooks import LAYOUTS, NUM_LAYERS, TINY
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sae_census import trace_feature
from sae_census.compute.effects import linear, tangent
from sae_census.compute.effects.linear import Split
from sae_census.compute.numbers.sae import Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK, Transform
from sae_census.config import AnalyzeConfig, TraceConfig
from sae_census.errors import ConfigError, ShardError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.effects.trace import trace
from sae_census.io import report
from sae_census.io.checkpoints import load_sae
from sae_census.io.model.blocks import matrix
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.model.paths import Paths, frozen
from sae_census.io.store import tables
from sae_census.steps.effects.tracing import Probe, split
from sae_census.types import STREAMS, HookPoint, Stream

WIDTH, FEATURES = 32, 6
IDS = torch.arange(9) % 11 + 3
POSITIONS = (0, 4, 7)
MakeConfig = Callable[..., AnalyzeConfig]


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family; weights of norms and biases too, so that no part is 0 by chance."""
    layout = LAYOUTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = TINY | layout.config | {"hidden_size": WIDTH, "num_attention_heads": 4}
        if "num_key_value_heads" in sizes:
            sizes["num_key_value_heads"] = 2  # two heads share each
        config = AutoConfig.for_model(name.split()[0], **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.4)
    return model.requires_grad_(False).to(dtype)


TRACEABLE = [name for name in LAYOUTS if not name.startswith(("qwen3_moe", "qwen3_5"))]


@pytest.fixture(scope="module", params=TRACEABLE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return build(name)


@pytest.fixture(scope="module")
def paths(model: Any) -> Paths:
    return Paths(model)


def streams_of(paths: Paths) -> list[Stream]:
    return [stream for stream in STREAMS if stream in paths._taps]


def random_sae(
    width: int, gate: Gate | None = None, transform: Transform = "none", *, pre_bias: bool = True
) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SparseAutoencoder(
        w_enc=normal(width, FEATURES),
        b_enc=normal(FEATURES),
        w_dec=normal(FEATURES, width),
        b_dec=normal(width),
        gate=gate or Relu(),
        pre_bias=normal(width) if pre_bias else None,
        transform=transform,
    )


def width_at(paths: Paths, point: HookPoint) -> int:
    return paths.read(IDS[:1], [point], [0]).streams[point].shape[1]


def close(actual: float, expected: float, scale: float, tolerance: float = 1e-4) -> None:
    assert abs(actual - expected) <= tolerance * scale, (actual, expected)


# --- the sum ---


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_the_parts_of_every_stream_of_every_family_add_up_to_the_pre_activation(paths, model, layer):
    for stream in streams_of(paths):
        point = HookPoint(layer, stream)
        sae = random_sae(width_at(paths, point))
        x = paths.read(IDS, [point], range(len(IDS))).streams[point]
        truth = sae.pre_activations(x, 3)  # not by the code under test
        probes = [Probe(hook_point=point, sae=sae, feature=3, position=position) for position in POSITIONS]
        for position, one in zip(POSITIONS, split(paths, IDS, probes), strict=True):
            close(one.pre_activation, float(truth[position]), float(truth.abs().max()))
            close(one.total, one.pre_activation, max(abs(one.pre_activation), 1.0))
            if len(one.heads):
                assert one.heads.shape[1:] == (model.config.num_attention_heads, position + 1)


GATES: dict[str, Gate] = {
    "relu": Relu(),
    "jumprelu": JumpRelu(torch.full((FEATURES,), 0.3)),
    "topk": TopK(2),
    "gated": Gated(torch.full((FEATURES,), 1e6), torch.linspace(-1, 1, FEATURES), torch.linspace(-1, 1, FEATURES)),
}


@pytest.mark.parametrize("transform", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("gate", GATES)
def test_every_kind_of_sae_is_split_and_fires_where_its_pre_activation_says(gate, transform):
    paths = Paths(build("llama"))
    point = HookPoint(1, "resid_post")
    sae = random_sae(WIDTH, GATES[gate], transform, pre_bias=gate != "relu")
    if gate == "gated":
        sae = replace(sae, b_enc=torch.zeros(FEATURES))
    x = paths.read(IDS, [point], [5]).streams[point]
    codes = sae.encode(x[None])
    assert len(codes)
    every = [Probe(hook_point=point, sae=sae, feature=feature, position=5) for feature in range(FEATURES)]
    for feature, one in enumerate(split(paths, IDS, every)):
        close(one.total, one.pre_activation, max(abs(one.pre_activation), 1.0))
        for code in codes.value[codes.feature == feature]:
            close(one.pre_activation, float(code), abs(float(code)))


def test_a_split_does_not_depend_on_what_is_traced_beside_it(paths):
    point = HookPoint(1, "resid_post")
    sae = random_sae(WIDTH)
    probes = [Probe(hook_point=point, sae=sae, feature=f, position=4) for f in (0, 2)]
    alone = split(paths, IDS, probes[1:])[0]
    mlp = HookPoint(0, "mlp_in")
    beside = [*probes, Probe(hook_point=mlp, sae=sae, feature=0, position=8)]
    assert np.array_equal(split(paths, IDS, beside)[1].heads, alone.heads)


def test_parts_are_the_streams_that_transformers_reports(paths, model):
    """The embedding with its position, and every MLP, by another road than the hooks of the code under test."""
    point, sae = HookPoint(1, "resid_post"), random_sae(WIDTH)
    one = split(paths, IDS, [Probe(hook_point=point, sae=sae, feature=0, position=4)])[0]
    read = sae.w_enc[:, 0]
    first = model.base_model(input_ids=IDS[None], output_hidden_states=True).hidden_states[0][0, 4]
    close(one.embed + one.position, float(first @ read), 1.0)
    has_positions = "gpt2" in type(model).__name__.lower()
    assert (one.position != 0) == has_positions
    got = []
    down = paths.blocks[1].after_mlp or paths.blocks[1].mlp
    handle = down.register_forward_hook(lambda _m, _a, out: got.append(out[0, 4]))
    model(input_ids=IDS[None])
    handle.remove()
    close(one.mlps[1], float(got[0] @ read), 1.0)


def test_rows_of_the_vocabulary_are_what_its_tokens_write_without_their_position(paths):
    writes = paths.read(IDS, [HookPoint(0, "resid_pre")], range(len(IDS))).writes
    torch.testing.assert_close(paths.embedding_rows()[IDS], writes.embed, rtol=1e-5, atol=1e-5)


# --- each part is what its ablation takes away ---


class Scaling(nn.Module):
    """A norm that does not look at its input, so that an ablation leaves its scale alone."""

    def __init__(self, gain: Tensor):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


VALUE_COLUMNS: dict[str, Callable[[Any, int], tuple[str, Any]]] = {
    # module and columns of the values, from the modelling code of each family
    "gpt2": lambda c, e: ("attn.c_attn", [*range(2 * c.n_embd, 3 * c.n_embd)]),
    "gpt_neox": lambda c, e: (
        "attention.query_key_value",
        [h * 3 * e + 2 * e + i for h in range(c.num_attention_heads) for i in range(e)],
    ),
    "phi3": lambda c, e: ("self_attn.qkv_proj", [*range((c.num_attention_heads + c.num_key_value_heads) * e,
                                                        (c.num_attention_heads + 2 * c.num_key_value_heads) * e)]),
}  # fmt: skip


def ablated(
    model: Any, module: nn.Module, side: str, edit: Callable[[Tensor], None], read: Callable[[], float]
) -> float:
    """`read` of a run in which `edit` changed a module's input or output in place."""

    def on_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        edit(output)
        return output

    def on_input(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone()
        edit(value)
        return (value, *args[1:])

    hook = module.register_forward_hook(on_output) if side == "out" else module.register_forward_pre_hook(on_input)
    try:
        return read()
    finally:
        hook.remove()


def test_a_source_token_and_a_head_bring_what_ablating_them_takes_away(name):
    model = build(name)
    for block in Paths(model).blocks:
        if block.after_attention is not None:
            holder = next(
                m for m in model.modules() if getattr(m, "post_attention_layernorm", None) is block.after_attention
            )
            holder.post_attention_layernorm = Scaling(torch.linspace(0.5, 1.5, WIDTH))
    paths, layer, position = Paths(model), 1, 6
    # in a parallel block the MLP does not see what attention writes, so the block's output may be read
    point = HookPoint(layer, "resid_mid" if "resid_mid" in paths._taps else "resid_post")
    sae = random_sae(WIDTH)
    one = split(paths, IDS, [Probe(hook_point=point, sae=sae, feature=2, position=position)])[0]

    def pre_activation() -> float:
        x = paths.read(IDS, [point], [position]).streams[point]
        return float(sae.pre_activations(x, 2))

    size = matrix(paths.blocks[layer].w_out).shape[0] // paths.num_heads
    separate = lambda c, e: ("self_attn.v_proj", slice(None))  # noqa: E731
    path, columns = VALUE_COLUMNS.get(name.split()[0], separate)(model.config, size)
    module = paths._modules[layer].get_submodule(path)
    bias = getattr(module, "bias", None)
    bias = torch.zeros(()) if bias is None else bias[columns]
    for source in (0, 3, position):

        def silence(output: Tensor, source: int = source) -> None:
            output[0, source, columns] = bias

        change = pre_activation() - ablated(model, module, "out", silence, pre_activation)
        close(one.heads[layer][:, source].sum(), change, max(abs(one.pre_activation), 1.0))
    values = paths.read(IDS, [point], [position]).writes.attention[layer].value_bias
    group = paths.num_heads // len(values)
    for head in range(paths.num_heads):

        def silence_head(z: Tensor, head: int = head) -> None:
            z[0, position, head * size : (head + 1) * size] = values[head // group]

        change = pre_activation() - ablated(model, paths.blocks[layer].w_out, "in", silence_head, pre_activation)
        close(one.heads[layer][head].sum(), change, max(abs(one.pre_activation), 1.0))


# --- gradients ---


class Exact(nn.Module):
    """An RMS norm in float64; those of transformers fall back to float32."""

    def __init__(self, norm: nn.Module, width: int):
        super().__init__()
        self.gain, self.eps = norm(torch.full((width,), 1e4)).double(), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain


def exact(name: str) -> Paths:
    """A model of the family that is float64 throughout."""
    model = build(name)
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                width = child.weight.shape[0] if hasattr(child, "weight") else 1
                setattr(module, key, Exact(child, width))
    return Paths(model.double())


def central(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-5) -> Tensor:
    steps = step * torch.eye(len(at)).double()
    return torch.tensor([(function(at + e) - function(at - e)) / (2 * step) for e in steps], dtype=torch.float64)


@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_equal_central_differences(name, freeze):
    paths = exact(name)
    for stream in ("mlp_in", "mlp_post", "mlp_out"):
        point = HookPoint(1, stream)
        readings = paths.read(IDS, [point], [4])
        at = readings.streams[paths.base_of(point)][0]
        assert at.dtype == torch.float64
        read = torch.randn(readings.streams[point].shape[1], generator=torch.Generator().manual_seed(1)).double()
        tail = paths.tail(point, at[None] if freeze else None)
        value, gradient = tangent.slope(lambda x, tail=tail, read=read: tail(x) @ read, at)
        close(value, float(readings.streams[point][0] @ read), 1.0, 1e-9)
        expected = central(lambda x, tail=tail, read=read: float(tail(x[None])[0] @ read), at)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("centred", [False, True])
def test_what_is_read_behind_a_frozen_norm_is_read_before_it_by_the_pulled_direction(centred):
    generator = torch.Generator().manual_seed(0)
    x, shift = (torch.randn(*shape, generator=generator).double() for shape in ((3, 8), (8,)))
    norm = nn.LayerNorm(8).double().requires_grad_(False) if centred else nn.RMSNorm(8).double().requires_grad_(False)
    norm.weight.copy_(torch.linspace(-1, 2, 8))
    if centred:
        norm.bias.copy_(shift)
    frozen_norm = frozen(norm, x)
    torch.testing.assert_close(frozen_norm(x), norm(x))
    read = torch.randn(8, generator=generator).double()
    for query in range(3):
        behind = float(norm(x)[query] @ read)
        before = float(x[query] @ frozen_norm.pull(read, query)) + float(frozen_norm.shift @ read)
        close(before, behind, 1.0, 1e-9)


def test_the_slope_of_an_inference_tensor_is_taken_also_without_gradients():
    with torch.inference_mode():
        at = torch.tensor([1.0, 2.0])
        value, gradient = tangent.slope(lambda x: x.square().sum(dim=1), at)
    with torch.no_grad():
        assert tangent.slope(lambda x: x.square().sum(dim=1), at)[0] == value
    assert value == 5.0
    assert gradient.tolist() == [2.0, 4.0]


# --- refusals ---


def test_half_precision_unknown_tokens_and_unknown_features_are_refused():
    point, sae = HookPoint(1, "resid_post"), random_sae(WIDTH)

    def probe(**changes: Any) -> list[Probe]:
        return [replace(Probe(hook_point=point, sae=sae, feature=0, position=0), **changes)]

    with pytest.raises(ConfigError, match=r"^tracing needs a model in float32, this one computes in torch\.bfloat16"):
        split(Paths(build("llama", torch.bfloat16)), IDS, probe())
    paths = Paths(build("llama"))
    with pytest.raises(ConfigError, match=r"^position 9 is outside the context, which has 0 to 8$"):
        split(paths, IDS, probe(position=9))
    with pytest.raises(ConfigError, match=r"^there is no feature 6; the SAE has 0 to 5$"):
        split(paths, IDS, probe(feature=6))
    with pytest.raises(ConfigError, match="asks for layer 5"):
        split(paths, IDS, probe(hook_point=HookPoint(5, "resid_post")))


def test_a_model_with_a_path_that_we_do_not_know_is_refused():
    model = build("llama")
    model.base_model.layers[0].register_forward_hook(lambda _module, _args, output: output + 1.0)
    sae = random_sae(WIDTH)
    with pytest.raises(ShardError, match=r"^the parts of feature 0 at blocks\.1\.hook_resid_post, position 3, add up"):
        split(Paths(model), IDS, [Probe(hook_point=HookPoint(1, "resid_post"), sae=sae, feature=0, position=3)])


def test_reading_leaves_the_model_as_it_was(paths, model):
    before = model(input_ids=IDS[None]).logits
    kept = model.config._attn_implementation
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    paths.read(IDS, [HookPoint(1, "mlp_post")], [2])
    paths.tail(HookPoint(1, "mlp_post"))(torch.ones(1, WIDTH))
    assert model.config._attn_implementation == kept
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(model(input_ids=IDS[None]).logits, before)


# --- rows ---


def random_split() -> Split:
    rng = np.random.default_rng(0)
    return Split(
        pre_activation=0.0,
        embed=1.5,
        position=0.0,
        first_layer=0,
        heads=rng.normal(size=(2, 3, 4)),
        head_biases=rng.normal(size=2),
        mlps=rng.normal(size=2),
        sae_bias=-1.0,
        intercept=0.25,
    )


def test_rows_divide_the_same_sum_by_part_by_source_and_list_the_strongest_pairs():
    one = random_split()
    rows = linear.parts(one, 5)
    assert [kind for kind in linear.KINDS if any(r.kind == kind for r in rows)] == list(
        dict.fromkeys(r.kind for r in rows)
    )
    assert "position" not in {row.kind for row in rows}, "an end that is 0 is no row"
    by_kind = {kind: [row for row in rows if row.kind == kind] for kind in linear.KINDS}
    whole = sum(row.contribution for kind in linear.KINDS[:6] for row in by_kind[kind])
    close(whole, one.total, 1.0, 1e-12)
    heads = sum(row.contribution for row in by_kind["head"])
    close(sum(row.contribution for row in by_kind["source"]), heads, 1.0, 1e-12)
    assert [(row.layer, row.head) for row in by_kind["head"]] == [(n, h) for n in range(2) for h in range(3)]
    assert [row.source for row in by_kind["source"]] == [0, 1, 2, 3]
    sizes = [abs(row.contribution) for row in by_kind["head_source"]]
    assert sizes == sorted(np.abs(one.heads).ravel(), reverse=True)[:5]
    for row in by_kind["head_source"]:
        assert row.contribution == one.heads[row.layer, row.head, row.source]


# --- the job ---


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, analyze_config: MakeConfig) -> Path:
    root = tmp_path_factory.mktemp("trace")
    analyze(analyze_config(root, catalog={"name": "tiny"}))
    return root


def config(store: Path, **changes: Any) -> TraceConfig:
    base: dict[str, Any] = {
        "store": {"root": str(store)},
        "catalog": {"name": "tiny"},
        "cluster": {"threads_per_worker": 1},
        "device": "cpu",
    }
    return TraceConfig(**base | changes)


def quiet(_line: str) -> None:
    pass


def test_rows_of_the_job_add_up_to_the_codes_of_the_catalog(store: Path) -> None:
    found = trace(config(store, best=4, spans=3), quiet)
    catalog = Catalog(store, "tiny")
    rows = tables.read(catalog.attached / "sources.parquet").to_pylist()
    spans: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        address = ("hook_point", "sae", "feature_id", "group", "sample_rank")
        spans.setdefault(tuple(row[name] for name in address), []).append(row)
    assert len(spans) == found.num_spans
    assert {key[1] for key in spans} == {"early", "late"}
    for mine in spans.values():
        first = mine[0]
        whole = sum(row["contribution"] for row in mine if row["kind"] in linear.KINDS[:6])
        close(whole, first["pre_activation"], abs(first["pre_activation"]))
        close(first["pre_activation"], first["value"], first["value"])
        sources = [row for row in mine if row["kind"] == "source"]
        assert [row["source_position"] for row in sources] == list(range(first["position"] + 1))
        span = next(
            span
            for span in catalog.spans(first["hook_point"], first["sae"], first["feature_id"], ["top"]).to_pylist()
            if span["sample_rank"] == first["sample_rank"]
        )
        inside = [row["source_token"] for row in sources[span["start"] :]]
        assert inside == span["tokens"][: len(inside)]
    with (catalog.attached / "sources.csv").open(newline="", encoding="utf-8") as file:
        assert [row["source_token"] or None for row in csv.DictReader(file)] == [
            row["source_token"] or None for row in rows
        ]
    facts = json.loads((catalog.attached / "trace.json").read_text())
    assert facts["catalog_digest"] == catalog.digest
    assert Catalog(store, "tiny").digest == catalog.digest


def test_a_later_run_adds_features_and_replaces_only_its_own(store: Path, tmp_path: Path) -> None:
    catalog = Catalog(store, "tiny")
    site = ("blocks.1.hook_resid_post", "late")
    ids = [row["feature_id"] for row in catalog.best(3, *site).to_pylist()]
    chosen = {"sae": "late", "spans": 2}
    trace(config(store, features=ids[:2], **chosen), quiet)
    before = catalog.sources(*site, ids[0])
    trace(config(store, features=ids[1:], **chosen | {"spans": 1}), quiet)
    assert catalog.sources(*site, ids[0]).equals(before)
    assert set(catalog.sources(*site, ids[1])["sample_rank"].to_pylist()) == {0}
    elsewhere = trace(config(store, features=ids[:1], out=str(tmp_path / "here"), **chosen), quiet)
    assert elsewhere.folder == tmp_path / "here"
    assert catalog.sources(*site, ids[0]).equals(before)
    assert tables.read(tmp_path / "here/sources.parquet").equals(before)


def test_double_precision_gives_the_same_rows_but_for_their_rounding(store: Path, tmp_path: Path) -> None:
    chosen = {"best": 3, "spans": 2}
    single = trace(config(store, out=str(tmp_path / "a"), **chosen), quiet)
    double = trace(config(store, out=str(tmp_path / "b"), dtype="float64", **chosen), quiet)
    assert (single.dtype, double.dtype) == ("float32", "float64")
    assert json.loads((tmp_path / "b/trace.json").read_text())["dtype"] == "float64"
    rows, precise = (found.sources.to_pylist() for found in (single, double))
    key = ("kind", "layer", "head", "source_position")
    one, other = (
        {tuple(row[k] for k in (*key, "feature_id", "sample_rank")): row for row in found} for found in (rows, precise)
    )
    assert any(one[key]["contribution"] != other[key]["contribution"] for key in one.keys() & other.keys())
    for key in one.keys() & other.keys():
        close(one[key]["contribution"], other[key]["contribution"], abs(one[key]["pre_activation"]))


@pytest.mark.ray
def test_workers_on_ray_give_the_same_rows(store: Path, tmp_path: Path) -> None:
    here = trace(config(store, best=3, spans=2, out=str(tmp_path / "a")), quiet)
    workers = {"executor": "ray", "workers": 2, "threads_per_worker": 1}
    there = trace(config(store, best=3, spans=2, out=str(tmp_path / "b"), cluster=workers), quiet)
    assert there.sources.equals(here.sources)


def test_origins_average_over_spans_and_keep_the_sum(store: Path) -> None:
    found = trace(config(store, best=2, spans=3, out=str(store / "x")), quiet)
    for one in found.origins:
        close(sum(part.mean for part in one.parts), one.pre_activation, abs(one.pre_activation))
        heads = sum(part.mean for part in one.parts if part.label.startswith("head"))
        close(sum(source.mean for source in one.sources), heads, max(1.0, abs(heads)))
        assert [abs(p.mean) for p in one.parts] == sorted((abs(p.mean) for p in one.parts), reverse=True)
        itself = next(source for source in one.sources if source.label == "itself")
        assert itself.num_spans == one.num_spans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "best"}, "group is 'best'; catalog 'tiny' has top, random, band_0"),
        (
            {"sae": "other"},
            "sae=other fits no SAE of catalog 'tiny'; it has early at blocks.0.hook_resid_post, late at",
        ),
        ({"features": [1]}, "features names ids of one SAE, but the catalog has early at"),
        ({"features": [96], "sae": "late"}, "features names 96, but late has features 0 to 95"),
        ({"features": [5], "sae": "late"}, "none of the 1 chosen features has a span in the group top"),
        ({"snapshot": 7}, "there is no catalog 'tiny' with snapshot 7"),
    ],
)
def test_what_the_catalog_does_not_have_is_refused(store, changes, message):
    with pytest.raises(ConfigError) as refusal:
        trace(config(store, **changes), quiet)
    assert message in str(refusal.value)


def test_sources_of_a_catalog_without_any_are_refused(store: Path, tmp_path: Path) -> None:
    catalog = Catalog(store, "tiny")
    catalog.attached = tmp_path
    with pytest.raises(ConfigError, match=r"holds no sources\.parquet; run sae-census trace on this catalog first$"):
        catalog.sources("blocks.1.hook_resid_post", "late", 0)


def test_one_feature_of_one_text_is_traced_in_a_notebook(model_dir: Path, sae_dirs: dict[str, Path]) -> None:
    model = LanguageModel(str(model_dir), dtype=torch.float32, device=torch.device("cpu"))
    encoder = load_sae(str(sae_dirs["late"]))
    (ids,) = model.tokenizer.encode(["mother bread kitchen sugar evening"])
    one = trace_feature(3, 4, model, torch.tensor(ids), encoder)
    close(one.total, one.pre_activation, max(1.0, abs(one.pre_activation)))


# --- the command ---


@pytest.fixture
def run(cli: Cli, store: Path) -> Cli:
    base = (f"store.root={store}", "catalog.name=tiny", "cluster.threads_per_worker=1", "device=cpu")
    return partial(cli, "trace", *base)


# Hydra leaves the handling of its log files to the garbage collector
hydra = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@hydra
def test_the_command_prints_what_features_come_from_and_where_the_rest_is(run: Cli, store: Path) -> None:
    feature = Catalog(store, "tiny").best(1, sae="late").to_pylist()[0]["feature_id"]
    code, out, err = run("sae=late", f"features=[{feature}]", "spans=2")
    assert code == 0, err
    assert f"blocks.1.hook_resid_post  late  feature {feature}: " in out
    assert "MLP 1" in out
    assert "traced    features: 1, spans: 2" in out
    assert "catalogs/tiny/attached/000001/sources.{parquet,csv,html}" in out


@hydra
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("feature=[1]", "config key feature is not known; did you mean features?"),
        ("features=[-1]", "features is [-1]; expected different ids from 0 on"),
        ("features=[1,1]", "features is [1, 1]; expected different ids from 0 on"),
        ("spans=0", "spans is 0: Input should be greater than 0"),
        ("dtype=bfloat16", "dtype is 'bfloat16': Input should be 'float32' or 'float64'"),
        ("sae=nobody", "sae=nobody fits no SAE of catalog 'tiny'; it has early at"),
    ],
)
def test_every_mistake_is_one_line_and_exit_code_2(run: Cli, override: str, sentence: str) -> None:
    code, _, err = run(override)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert sentence in line


@hydra
def test_spans_that_fail_are_listed_and_the_exit_code_says_so(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_census.steps.effects import tracing

    honest, calls = tracing.split, []

    def fail_once(*arguments: Any) -> list[Split]:
        calls.append(arguments)
        if len(calls) == 1:
            raise ShardError("the parts do not add up")
        return honest(*arguments)

    monkeypatch.setattr(tracing, "split", fail_once)
    monkeypatch.setattr("sae_census.flows.effects.trace.CONTEXTS_PER_TASK", 1)
    code, out, err = run("best=2", "spans=2")
    assert code == 3
    assert "left out: " in err
    assert "the parts do not add up" in err
    assert "batches of spans that failed and are missing: 1" in err
    assert "traced" in out
    monkeypatch.setattr(tracing, "split", lambda *_: (_ for _ in ()).throw(ShardError("never")))
    code, _, err = run("best=1", "spans=1")
    assert (code, "nothing could be traced: " in err) == (3, True)


# --- the page ---

HOSTILE = [
    '<script>alert("x")</script>',
    '" onmouseover="alert(1)',
    "'><img src=x onerror=alert(1)>",
    "&amp;{{ 7 * 7 }}",
]


def test_text_of_a_corpus_cannot_become_markup() -> None:
    def page_of(texts: list[str]) -> str:
        title, note, caption, header = texts
        cells = tuple(report.Cell(text=text, shade=0.5, hint=text) for text in texts)
        grid = report.Grid(caption=caption, header=(header,), rows=(cells,))
        line = report.Line(caption=caption, tokens=cells, peak=1)
        section = report.Section(title=title, note=note, tables=(grid,), lines=(line,))
        return report.page(title, note, [section]).decode()

    body, harmless = page_of(HOSTILE), page_of(["a", "b", "c", "d"])
    for mark in "<>\"'":  # hostile text adds no character that markup is made of
        assert body.count(mark) == harmless.count(mark), mark
    assert "{{ 7 * 7 }}" in body
    assert "49" not in body.split("<h1>")[1]


def test_the_page_of_the_job_shows_tokens_as_text(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from sae_census.io.tokens.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "token_texts", lambda self, rows: [["<script>" for _ in ids] for ids in rows])
    trace(config(store, best=1, spans=1, out=str(tmp_path)), quiet)
    body = (tmp_path / "sources.html").read_text()
    assert "<script" not in body
    assert "&lt;script&gt;" in body


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(TRACEABLE)))
def test_families_without_heads_or_one_mlp_are_refused(name):
    with pytest.raises(ConfigError, match="cannot be traced"):
        Paths(build(name))
