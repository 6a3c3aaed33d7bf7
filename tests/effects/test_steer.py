"""Edits against the formula written out, and the two jobs that make them: steered text, and what ablation costs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Cli
from scipy import stats
from test_sae import GATES, TRANSFORMS, D, F, literal_code, random_sae
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_census.compute.effects import effects
from sae_census.compute.effects.edits import Edit, edit
from sae_census.compute.numbers.sae import Gated, SparseAutoencoder
from sae_census.config import AblateConfig, AttributeConfig, SteerConfig
from sae_census.errors import ArgumentError, ConfigError, IdentityError
from sae_census.flows.catalog.attribute import attribute
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.effects import ablate as ablate_flow
from sae_census.flows.effects import steer as steer_flow
from sae_census.steps.effects import ablation

N = 33
EDITS = (Edit(feature=2, value=-1.5), Edit(feature=7, value=2.0, mode="add"), Edit(feature=11, value=0, mode="set"))


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, D, generator=torch.Generator().manual_seed(9)) + 1).to(dtype)


def prepared(sae: SparseAutoencoder, x: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The SAE's input for one token, and the factor and offset that undo its transform."""
    match sae.transform:
        case "constant_norm_rescale":
            scale = np.linalg.norm(x) / D**0.5
            return x / scale, scale, 0.0
        case "layer_norm":
            return (x - x.mean()) / (x.std(ddof=1) + 1e-5), x.std(ddof=1), x.mean()
        case _:
            return x, 1.0, 0.0


def by_hand(sae: SparseAutoencoder, x: Tensor, edits: tuple[Edit, ...]) -> np.ndarray:
    """Each token's activation plus the difference of two whole reconstructions, in float64."""
    w_dec, b_dec = sae.w_dec.double().numpy(), sae.b_dec.double().numpy()
    rows = []
    for token in x.double().numpy():
        u, scale, offset = prepared(sae, token)
        z = literal_code(sae, u - (0 if sae.pre_bias is None else sae.pre_bias.double().numpy()))
        new = z.copy()
        for one in edits:
            match one.mode:
                case "scale":
                    new[one.feature] *= one.value
                case "add":
                    new[one.feature] += one.value
                case "set":
                    new[one.feature] = one.value
        decoded = [(codes @ w_dec + b_dec) * scale + offset for codes in (new, z)]
        rows.append(token + decoded[0] - decoded[1])
    return np.array(rows)


# edits


@pytest.mark.parametrize("pre_bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gate", GATES)
def test_an_edit_adds_the_difference_of_two_reconstructions(gate: str, transform: Any, pre_bias: bool) -> None:
    sae, x = random_sae(gate, transform, pre_bias=pre_bias), tokens()
    got = edit(sae, x, EDITS)
    np.testing.assert_allclose(got.x.numpy(), by_hand(sae, x, EDITS), rtol=1e-4, atol=1e-4)
    assert got.touched.all()
    one = edit(sae, x, EDITS[:1])
    np.testing.assert_allclose(one.x.numpy(), by_hand(sae, x, EDITS[:1]), rtol=1e-4, atol=1e-4)
    assert torch.equal(one.x[~one.touched], x[~one.touched])


@pytest.mark.parametrize("gate", GATES)
def test_codes_of_some_features_are_columns_of_all_codes(gate: str) -> None:
    sae, x = random_sae(gate, "layer_norm", pre_bias=True), tokens()
    codes, z = sae.encode(x[None]), torch.zeros(N, F)
    z[codes.position.tolist(), codes.feature.tolist()] = torch.from_numpy(codes.value)
    chosen = torch.tensor([11, 0, 7])
    assert 0.1 < (z > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.codes_of(x, chosen), z[:, chosen])


def test_a_gate_with_a_matrix_of_its_own_judges_by_it() -> None:
    sae, x = random_sae("gated"), tokens()
    gate = sae.gate
    assert isinstance(gate, Gated)
    w_gate = torch.randn(D, F, generator=torch.Generator().manual_seed(5))
    own = Gated(gate.b_gate, gate.b_mag, gate.r_mag, w_gate)
    parts = {"w_enc": sae.w_enc, "b_enc": sae.b_enc, "w_dec": sae.w_dec, "b_dec": sae.b_dec}
    got = SparseAutoencoder(**parts, gate=own).codes_of(x, torch.arange(F))
    expected = (x @ (sae.w_enc * gate.r_mag.exp()) + gate.b_mag).relu() * (x @ w_gate + gate.b_gate > 0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, sae.codes_of(x, torch.arange(F)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gate", GATES)
def test_edits_that_leave_the_codes_alone_give_back_the_very_tensor(gate: str, dtype: torch.dtype) -> None:
    sae, x = random_sae(gate, "layer_norm", pre_bias=True), tokens(dtype)
    sae.b_enc[11] = -1000  # silent, but for the gated SAE, which has its own biases
    fires = (sae.codes_of(x, torch.arange(F)) > 0).sum(dim=0)
    some = int(torch.where(fires < N, fires, 0).argmax())
    idle = [Edit(feature=some, value=1.0), Edit(feature=7, value=0.0, mode="add")]
    if gate != "gated":
        idle += [Edit(feature=11, value=50.0), Edit(feature=11, value=0, mode="set")]
    got = edit(sae, x, idle)
    assert got.x is x
    assert not got.touched.any()
    doubled = edit(sae, x, [Edit(feature=some, value=2.0)])
    assert doubled.x.dtype == dtype
    assert 0 < doubled.touched.sum() < N
    assert torch.equal(doubled.x[~doubled.touched], x[~doubled.touched])


def test_the_sign_of_a_zero_survives_where_nothing_is_touched() -> None:
    sae, x = random_sae("relu"), torch.full((2, D), -0.0)
    x[1] = 40 * sae.w_enc[:, 3]
    got = edit(sae, x, [Edit(feature=3, value=5.0, mode="set")], where=torch.tensor([False, True]))
    assert torch.signbit(got.x[0]).all()
    assert got.touched.tolist() == [False, True]


def test_several_edits_of_a_feature_are_applied_in_order() -> None:
    sae, x = random_sae("jumprelu"), tokens()
    steps = [Edit(feature=2, value=3.0, mode="set"), Edit(feature=2, value=2.0), Edit(feature=2, value=1, mode="add")]
    torch.testing.assert_close(edit(sae, x, steps).x, edit(sae, x, [Edit(feature=2, value=7.0, mode="set")]).x)
    torch.testing.assert_close(edit(sae, x, steps[::-1]).x, edit(sae, x, steps[:1]).x)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_dropping_the_error_leaves_the_reconstruction_of_the_edited_codes(transform: Any) -> None:
    sae, x = random_sae("topk", transform), tokens()
    where = torch.arange(N) % 3 > 0
    got = edit(sae, x, EDITS, where=where, error_term="drop")
    whole = sae.reconstruct(x[None], sae.encode(x[None]))[0]
    expected = whole + torch.from_numpy(by_hand(sae, x, EDITS)).float() - x
    torch.testing.assert_close(got.x[where], expected[where], rtol=1e-4, atol=1e-4)
    assert torch.equal(got.x[~where], x[~where])
    assert torch.equal(got.touched, where)


def test_a_million_is_finite_where_the_dtype_reaches_and_an_error_where_not() -> None:
    sae = random_sae("relu")
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.isfinite(edit(sae, tokens(dtype), [Edit(feature=2, value=1e6)]).x).all()
    message = r"^the edits scale 1e\+06 of feature 2 push activations beyond 6\.55e\+04, the largest float16"
    with pytest.raises(ArgumentError, match=message):
        edit(sae, tokens(torch.float16), [Edit(feature=2, value=1e6)])
    with pytest.raises(ArgumentError, match="the largest float32"):
        edit(sae, tokens(), [Edit(feature=2, value=3e38, mode="set"), Edit(feature=3, value=3e38, mode="set")])


@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_formula(gate: str) -> None:
    """Against central differences of the sum of squares, along random directions."""
    sae, x = random_sae(gate, "constant_norm_rescale", pre_bias=True), tokens()[:5].requires_grad_(True)
    (slope,) = torch.autograd.grad(edit(sae, x, EDITS).x.square().sum(), x)
    for seed in range(4):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        step = 1e-4 * direction.double().numpy()
        ends = [
            np.square(by_hand(sae, torch.from_numpy(x.detach().double().numpy() + sign * step), EDITS)).sum()
            for sign in (1, -1)
        ]
        assert float((slope * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)


# effects


def test_an_interval_is_students_and_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3, 2, 9)
    low, high = stats.t.interval(0.9, 8, values.mean(), stats.sem(values))
    got = effects.mean_interval(values, 0.9)
    assert got == pytest.approx((values.mean(), low, high, 9))
    covered = [effects.mean_interval(generator.normal(3, 2, 6), 0.9) for _ in range(2000)]
    assert np.mean([one.low <= 3 <= one.high for one in covered]) == pytest.approx(0.9, abs=0.02)
    assert effects.mean_interval(values[:1], 0.9)[0] == values[0]
    assert np.isnan(effects.mean_interval(values[:1], 0.9)[1:3]).all()
    assert np.isnan(effects.mean_interval(values[:0], 0.9)[0])


def test_divergence_and_losses_are_those_of_the_definition() -> None:
    p, q = (torch.randn(5, 11, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    a, b = (np.exp(t.numpy()) / np.exp(t.numpy()).sum(1, keepdims=True) for t in (p, q))
    np.testing.assert_allclose(effects.divergence(p, q), (a * np.log(a / b)).sum(1), rtol=1e-5)
    assert torch.equal(effects.divergence(p, p), torch.zeros(5))
    targets = torch.tensor([3, 0, 10, 5, 5])
    np.testing.assert_allclose(effects.losses(p, targets), -np.log(a[np.arange(5), targets]), rtol=1e-5)


def test_the_most_lowered_tokens_come_first_and_the_lowest_id_wins_a_tie() -> None:
    change = torch.tensor([[0.0, -3.0, -1.0, -3.0, 2.0], [0.0, -1.0, -3.0, -1.0, 2.0]])
    assert effects.most_lowered(change, 4).tolist() == [1, 2, 3, 0]
    assert effects.most_lowered(change, 99).tolist() == [1, 2, 3, 0, 4]


# the jobs

LATE = "blocks.1.hook_resid_post"


hydra_leaks = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., Any]) -> Catalog:
    config = analyze_config(tmp_path_factory.mktemp("steer"), catalog={"name": "mine"}, masks={"first_positions": 1})
    return analyze(config, lambda line: None).catalog


def root_of(catalog: Catalog) -> Path:
    return catalog.folder.parents[2]


@pytest.fixture
def steered(model_dir: Path, sae_dirs: dict[str, Path]) -> Callable[..., SteerConfig]:
    """Makes a config of the tiny world."""

    def make(**overrides: Any) -> SteerConfig:
        sections: dict[str, Any] = {
            "model": {"id": str(model_dir), "dtype": "float32", "device": "cpu"},
            "saes": [{"path": str(path)} for path in sae_dirs.values()],
            "prompt": "river water stone bridge",
            "edits": [{"hook_point": LATE, "feature": 9, "mode": "set", "value": 30}],
            "generate": {"max_new_tokens": 6},
            "threads": 1,
        }
        return SteerConfig(**(sections | overrides))

    return make


def test_a_steered_text_is_the_plain_one_exactly_when_nothing_is_touched(steered: Callable[..., SteerConfig]) -> None:
    idle = steer_flow.steer(steered(edits=[{"hook_point": LATE, "feature": 9, "mode": "scale", "value": 1}]))
    assert idle.steered == idle.unsteered
    assert idle.positions[LATE].touched == 0
    assert (idle.kl_next, idle.kl_mean, idle.changed) == (0, 0, ())
    moved = steer_flow.steer(steered(positions="all"))
    assert moved.unsteered.continuation == idle.unsteered.continuation
    assert moved.steered.continuation != moved.unsteered.continuation
    seen = len(moved.steered.tokens)
    assert (moved.positions[LATE], moved.left_out) == ((seen, seen), {LATE: {}})
    counted = steer_flow.steer(steered())
    assert counted.positions[LATE] == (seen - 1, seen)
    assert counted.left_out == {LATE: {"special_tokens": 1}}
    assert (counted.dtype, counted.device) == ("float32", "cpu")


def test_kl_and_codes_are_those_of_the_model_run_by_hand(
    steered: Callable[..., SteerConfig], model_dir: Path, sae_dirs: dict[str, Path]
) -> None:
    from sae_census.io.checkpoints import load_sae

    got, sae = steer_flow.steer(steered(changed=200, positions="all")), load_sae(str(sae_dirs["late"])).sae
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer("river water stone bridge")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(2)], dim=1)
        assert got.unsteered.continuation == tokenizer.decode(ids[0, len(prompt) :])
        seen: list[Tensor] = []

        def force(_module: Any, _args: Any, output: Tensor) -> Tensor:
            z = sae.codes_of(output[0], torch.tensor([9]))
            seen[:] = [output, output + (30 - z) * sae.w_dec[9], z]
            return seen[1]

        plain = model(ids[:, :-1]).logits[0].log_softmax(1)
        handle = model.model.layers[1].register_forward_hook(force)
        pushed = model(ids[:, :-1]).logits[0].log_softmax(1)
        handle.remove()
    kl = (plain.exp() * (plain - pushed)).sum(1)
    assert got.kl_next == pytest.approx(float(kl[len(prompt) - 1]), rel=1e-3)
    assert got.kl_mean == pytest.approx(float(kl[len(prompt) - 1 :].mean()), rel=1e-3)
    (edited,) = got.unsteered.edited
    assert edited.codes == pytest.approx(tuple(seen[2][:, 0].tolist()), rel=1e-3, abs=1e-3)
    means = [sae.codes_of(x[0, 1:], torch.arange(96)).mean(dim=0) for x in seen[:2]]
    late = {one.feature_id: one for one in got.changed if str(one.site.hook_point) == LATE}
    assert len(late) > 5
    for feature, one in late.items():
        assert (one.unsteered, one.steered) == pytest.approx([float(m[feature]) for m in means], rel=1e-3, abs=1e-3)
    sizes = [abs(one.steered - one.unsteered) for one in late.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert not [one for one in got.changed if str(one.site.hook_point) != LATE]  # the other SAE reads upstream


def test_the_checkpoints_way_to_generate_does_not_shape_the_comparison_but_its_end_tokens_do(
    steered: Callable[..., SteerConfig], model_dir: Path, tmp_path: Path
) -> None:
    plain = steer_flow.steer(steered())
    for name, settings in {
        "habits": {"num_beams": 3, "repetition_penalty": 1.8, "forced_eos_token_id": 9, "min_new_tokens": 2},
        "end": {"eos_token_id": [plain_id(plain, model_dir)]},
    }.items():
        folder = shutil.copytree(model_dir, tmp_path / name)
        (folder / "generation_config.json").write_text(json.dumps(settings))
        config = steered()
        again = steer_flow.steer(
            config.model_copy(update={"model": config.model.model_copy(update={"id": str(folder)})})
        )
        if name == "habits":
            assert (again.unsteered, again.steered) == (plain.unsteered, plain.steered)
        else:
            assert len(again.unsteered.tokens) < len(plain.unsteered.tokens)


def plain_id(plain: steer_flow.Steering, model_dir: Path) -> int:
    """A token of the plain continuation."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == plain.unsteered.tokens[-2])


def test_sampling_starts_both_texts_from_one_seed(steered: Callable[..., SteerConfig]) -> None:
    generate = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    idle = steer_flow.steer(steered(generate=generate, edits=[{"hook_point": LATE, "feature": 9, "value": 1}]))
    assert idle.steered.continuation == idle.unsteered.continuation
    other = steer_flow.steer(steered(generate=generate | {"seed": 4}))
    assert other.unsteered.continuation != idle.unsteered.continuation


def test_dead_features_are_refused_unless_told(steered: Callable[..., SteerConfig], catalog: Catalog) -> None:
    knows = {"store": {"root": str(root_of(catalog))}, "catalog": {"name": "mine"}}
    dead = [{"hook_point": LATE, "feature": 5, "mode": "add", "value": 3}]
    assert catalog.feature(LATE, "late", 5)["dead"]
    with pytest.raises(
        ConfigError, match=r"feature 5 of .*/late is dead: it never fired on the [\d,]+ tokens of catalog mine"
    ):
        steer_flow.steer(steered(edits=dead, **knows))
    touched = steer_flow.steer(steered(edits=dead, allow_dead=True, **knows)).positions[LATE].touched
    assert touched == steer_flow.steer(steered(edits=dead)).positions[LATE].touched > 0
    alive = int(catalog.best(1, LATE)["feature_id"][0].as_py())
    assert steer_flow.steer(steered(edits=[dead[0] | {"feature": alive}], **knows)).positions[LATE].touched > 0
    with pytest.raises(ConfigError, match=r"blocks\.1\.hook_resid_post/late has no feature 96; expected 0 to 95"):
        steer_flow.steer(steered(edits=[dead[0] | {"feature": 96}], **knows))


def test_a_catalog_of_another_sae_is_no_witness(
    steered: Callable[..., SteerConfig], catalog: Catalog, sae_dirs: dict[str, Path]
) -> None:
    saes = [{"path": str(sae_dirs["late"]), "name": "later"}]
    with pytest.raises(IdentityError, match=r"^catalog 'mine' was not made with SAE blocks\.1\.hook_resid_post/later"):
        steer_flow.steer(steered(saes=saes, store={"root": str(root_of(catalog))}, catalog={"name": "mine"}))


@hydra_leaks
def test_the_job_prints_both_texts_and_says_when_nothing_was_touched(
    cli: Cli, model_dir: Path, sae_dirs: dict[str, Path]
) -> None:
    base = [f"model.id={model_dir}", "model.dtype=float32", f"saes=[{{path: {sae_dirs['late']}}}]", "threads=1"]
    base += ["prompt=river water", "generate.max_new_tokens=4"]
    code, out, err = cli("steer", *base, "edits=[{feature: 9, mode: set, value: 30}]")
    assert code == 0, err
    assert "unsteered" in out
    assert f"positions at {LATE}" in out
    assert "nats at the first new token" in out
    code, out, _ = cli("steer", *base, "edits=[{feature: 9, value: 1}]")
    assert (code, "the edits left every code as it was" in out) == (0, True)
    for override, sentence in (
        ("edits=[{feature: 96, value: 2}]", "late has no feature 96; expected 0 to 95"),
        ("edits=[]", "expected at least one edit"),
        (
            "edits=[{feature: 9, value: 2, hook_point: blocks.0.hook_resid_post}]",
            "edits name blocks.0.hook_resid_post, but",
        ),
        ("edits=[{feature: 9, value: nan}]", "should be a finite number"),
    ):
        code, _, err = cli("steer", *base, override)
        assert (code, sentence in err) == (2, True), err
        assert "Traceback" not in err


# ablation


@pytest.fixture(scope="module")
def base(catalog: Catalog) -> dict[str, Any]:
    return {
        "store": {"root": str(root_of(catalog))},
        "catalog": {"name": "mine"},
        "best": 2,
        "contexts": 3,
        "cluster": {"executor": "inline", "threads_per_worker": 1},
    }


@pytest.fixture(scope="module")
def done(base: dict[str, Any]) -> ablate_flow.Ablations:
    return ablate_flow.ablate(AblateConfig(**base))


def literal_ablation(
    catalog: Catalog, sae: SparseAutoencoder, model: Any, span: dict[str, Any], hook_point: str, feature: int
) -> tuple[float, Tensor, Tensor, float]:
    """Change of loss after the peak, of logits and probabilities at it, and the code there: two plain forwards."""
    shards = root_of(catalog) / "corpora" / catalog.manifest.preparation_id / "shards"
    ids = pq.read_table(shards / f"{span['shard_id']}.parquet")["input_ids"].to_pylist()[span["context_id"]]
    ids = torch.tensor([ids])  # the whole context: what comes after the span must not matter
    special = torch.tensor([[i in (0, 1, 2) for i in ids[0].tolist()]])
    code = []

    def zero(_module: Any, _args: Any, x: Tensor) -> Tensor:
        z = sae.codes_of(x[0], torch.tensor([feature]))[:, 0]
        code.append(float(z[span["position"]]))
        z = torch.where(special[0] | (torch.arange(len(z)) < 1), 0, z)
        scale = torch.ones(len(z)) if sae.transform == "none" else x[0].std(dim=1)
        return x - (z * scale)[None, :, None] * sae.w_dec[feature]

    with torch.no_grad():
        before = model(ids).logits[0]
        handle = model.model.layers[int(hook_point.split(".")[1])].register_forward_hook(zero)
        after = model(ids).logits[0]
        handle.remove()
    losses = []
    for logits in (before, after):
        at = range(span["position"], span["stop"] - 1)
        losses.append(np.mean([-float(logits[i].log_softmax(0)[ids[0, i + 1]]) for i in at]) if at else np.nan)
    ends = before[span["position"]], after[span["position"]]
    change = ends[1] - ends[0]
    return losses[1] - losses[0], change - change.mean(), ends[1].softmax(0) - ends[0].softmax(0), code[0]


def test_ablation_is_two_plain_forwards_a_span(
    done: ablate_flow.Ablations, catalog: Catalog, model_dir: Path, sae_dirs: dict[str, Path]
) -> None:
    from sae_census.io.checkpoints import load_sae

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    rows = done.table.to_pylist()
    assert len(rows) == 4
    assert done.failures == done.skipped == ()
    for row in rows:
        sae = load_sae(str(sae_dirs[row["sae"]])).sae
        key = (row["hook_point"], row["sae"], row["feature_id"])
        spans = sorted(catalog.spans(*key, ["random"]).to_pylist(), key=lambda s: s["sample_rank"])
        assert row["spans"] == len(spans) > 2
        found = [literal_ablation(catalog, sae, model, span, key[0], key[2]) for span in spans]
        loss = np.array([one[0] for one in found])
        loss = loss[np.isfinite(loss)]
        assert row["loss_spans"] == len(loss)
        assert row["loss_change"] == pytest.approx(loss.mean(), rel=1e-3, abs=1e-5)
        if len(loss) > 1:
            low, high = stats.t.interval(0.95, len(loss) - 1, loss.mean(), stats.sem(loss))
            got = (row["loss_change_low"], row["loss_change_high"])
            assert got == pytest.approx((low, high), rel=1e-3, abs=1e-4)
        change = torch.stack([one[1] for one in found])
        chosen = torch.stack([one[2] for one in found])[0::2].mean(dim=0).argsort()[:5]
        assert set(row["token_ids"]) == set(chosen.tolist())
        assert row["logit_spans"] == len(change[1::2])
        assert row["logit_change"] == pytest.approx(float(change[1::2, chosen].mean()), rel=1e-3, abs=1e-4)
        assert row["code"] == pytest.approx(np.mean([span["value"] for span in spans]))
        assert row["code_deviation"] < 1e-3
        assert abs(row["control_loss_change"]) > 0
        assert row["excess_loss_change"] == pytest.approx(row["loss_change"] - row["control_loss_change"], abs=1e-6)


def test_the_control_moves_as_far_as_the_ablation(
    base: dict[str, Any], catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Tensor] = []

    class Watched(ablation.Interventions):
        def __init__(self, blocks: Any, taps: Any, functions: Any):
            def watch(function: Any) -> Any:
                def run(x: Tensor) -> Tensor:
                    y: Tensor = function(x)
                    steps.append((y - x).norm(dim=2))
                    return y

                return run

            super().__init__(blocks, taps, {point: watch(function) for point, function in functions.items()})

    monkeypatch.setattr(ablation, "Interventions", Watched)
    ablate_flow.ablate(AblateConfig(**base | {"best": 1}))
    assert len(steps) > 4
    for zeroed, control in zip(steps[0::2], steps[1::2], strict=True):
        torch.testing.assert_close(control, zeroed, rtol=1e-3, atol=1e-4)
        assert (zeroed[:, 0] == 0).all()  # masks.first_positions=1
        assert (zeroed > 0).any()


def test_the_table_joins_the_catalog_and_the_same_work_gives_the_same_bytes(
    done: ablate_flow.Ablations, base: dict[str, Any], catalog: Catalog
) -> None:
    again = ablate_flow.ablate(AblateConfig(**base))
    assert (again.path, again.path.parent) == (done.path, root_of(catalog) / "catalogs" / "mine" / "ablations")
    query = f"""SELECT f.rank, a.loss_change, a.tokens FROM '{done.path}' a
                JOIN '{catalog.folder}/features.parquet' f USING (hook_point, sae, feature_id) ORDER BY 1"""
    assert [row[0] for row in duckdb.sql(query).fetchall()] == [1, 1, 2, 2]
    assert Catalog(root_of(catalog), "mine").digest == catalog.digest
    other = ablate_flow.ablate(AblateConfig(**base | {"seed": 1}))
    for name in done.table.column_names:
        same = done.table[name].to_pylist() == other.table[name].to_pylist()
        assert same != name.startswith(("control_", "excess_")), name


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_on_ray_give_the_same_bytes(done: ablate_flow.Ablations, base: dict[str, Any]) -> None:
    cluster = {"executor": "ray", "workers": 2, "threads_per_worker": 1}
    assert ablate_flow.ablate(AblateConfig(**base | {"cluster": cluster})).path == done.path


def test_the_tokens_of_the_catalog_are_followed_on_demand(
    base: dict[str, Any], catalog: Catalog, tmp_path: Path
) -> None:
    root = shutil.copytree(root_of(catalog), tmp_path / "runs")
    feature = int(catalog.best(1, LATE)["feature_id"][0].as_py())
    named = {"sae": "late", "features": [feature], "top_tokens": "catalog", "num_tokens": 3}
    config = AblateConfig(**base | named | {"store": {"root": str(root)}})
    with pytest.raises(ConfigError, match=r"of catalog 'mine' has no logits; run sae-census attribute"):
        ablate_flow.ablate(config)
    attribute(AttributeConfig(**{name: base[name] for name in ("catalog", "cluster")}, store=config.store))
    rows = Catalog(root, "mine").logits(LATE, "late", feature).to_pylist()
    best = sorted((row for row in rows if row["sign"] == "positive"), key=lambda row: row["rank"])[:3]
    (row,) = ablate_flow.ablate(config).table.to_pylist()
    assert row["token_ids"] == [one["token_id"] for one in best]
    assert row["logit_spans"] == row["spans"]


@hydra_leaks
def test_the_job_prints_intervals_and_names_what_it_skips(cli: Cli, catalog: Catalog) -> None:
    base = [f"store.root={root_of(catalog)}", "catalog.name=mine", "cluster.threads_per_worker=1", "contexts=3"]
    best = catalog.best(1, LATE)["feature_id"][0].as_py()
    code, out, err = cli("ablate", *base, "sae=late", f"features=[5,{best}]", "group=top", "spans=4")
    assert code == 0, err
    assert "zeroed on top spans" in out
    assert "\ncomputed  in float32\n" in out
    assert "ablations/000001-" in out
    assert f"skipped   feature 5 of {LATE}/late has no top spans" in err
    for override, sentence in (
        ("features=[5]", f"no feature could be ablated: feature 5 of {LATE}/late has no random spans"),
        ("features=[96]", "features names 96, but late has features 0 to 95"),
        ("features=[-1]", "features.0 is -1"),
        ("sae=none", "sae=none fits no SAE of catalog 'mine'"),
        ("group=best", "group is best; expected one of top, random, band_0"),
        ("group=non_activating", "group is non_activating; expected one of"),
        ("catalog.name=yours", "there is no catalog 'yours'"),
    ):
        code, _, err = cli("ablate", *base, "sae=late", override)
        assert (code, sentence in err) == (2, True), err
