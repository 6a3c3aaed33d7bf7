"""The SAE forward pass against its formulas written out in float64, and the laws of its tiles and ties."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_census.compute.numbers import sae as sae_module
from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.sae import Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK, Transform

D, F, B, T = 6, 19, 5, 7
GATES = ("relu", "jumprelu", "topk", "gated")
TRANSFORMS = ("none", "constant_norm_rescale", "layer_norm")


def random_sae(gate: str, transform: Transform = "none", *, pre_bias: bool = False) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(GATES.index(gate))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gates: dict[str, Gate] = {
        "relu": Relu(),
        "jumprelu": JumpRelu(normal(F).abs()),
        "topk": TopK(4),
        "gated": Gated(normal(F), normal(F), 0.5 * normal(F)),
    }
    return SparseAutoencoder(
        w_enc=normal(D, F),
        b_enc=torch.zeros(F) if gate == "gated" else normal(F),
        w_dec=normal(F, D),
        b_dec=normal(D),
        gate=gates[gate],
        pre_bias=normal(D) if pre_bias else None,
        transform=transform,
    )


def random_x(batch: int = B) -> Tensor:
    return 3 * torch.randn(batch, T, D, generator=torch.Generator().manual_seed(9)) + 1


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def literal_code(sae: SparseAutoencoder, v: np.ndarray) -> np.ndarray:
    """The code (F) of one token from the encoder's input (D)."""
    pre = v @ exact(sae.w_enc) + exact(sae.b_enc)
    match sae.gate:
        case Relu():
            return np.maximum(pre, 0)
        case JumpRelu(threshold):
            return np.where(pre > exact(threshold), np.maximum(pre, 0), 0)
        case TopK(k):
            best = np.argsort(-pre, kind="stable")[:k]
            return np.where(np.isin(np.arange(len(pre)), best), np.maximum(pre, 0), 0)
        case Gated(b_gate, b_mag, r_mag):
            magnitude = v @ (exact(sae.w_enc) * np.exp(exact(r_mag))) + exact(b_mag)
            return np.where(v @ exact(sae.w_enc) + exact(b_gate) > 0, np.maximum(magnitude, 0), 0)


def literal(sae: SparseAutoencoder, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Dense codes (B, T, F) and reconstruction (B, T, D), token by token, as the formulas stand on paper."""
    codes, reconstruction = np.zeros((*x.shape[:2], sae.num_features)), np.zeros(x.shape)
    for row, position in np.ndindex(*x.shape[:2]):
        token = exact(x[row, position])
        match sae.transform:
            case "none":
                u, scale, shift = token, 1.0, 0.0
            case "constant_norm_rescale":
                scale, shift = np.sqrt((token**2).mean()), 0.0
                u = token / scale
            case "layer_norm":
                scale, shift = token.std(ddof=1), token.mean()
                u = (token - shift) / (scale + 1e-5)
        z = literal_code(sae, u if sae.pre_bias is None else u - exact(sae.pre_bias))
        codes[row, position] = z
        reconstruction[row, position] = (z @ exact(sae.w_dec) + exact(sae.b_dec)) * scale + shift
    return codes, reconstruction


def dense(codes: Codes, batch: int = B, num_features: int = F, num_positions: int = T) -> np.ndarray:
    array = np.zeros((batch, num_positions, num_features), np.float32)
    array[codes.row, codes.position, codes.feature] = codes.value
    return array


def assert_same(actual: Codes, expected: Codes) -> None:
    for name in ("feature", "row", "position"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(actual.value, expected.value, rtol=1e-5, atol=1e-6)


def set_tiles(monkeypatch: pytest.MonkeyPatch, tokens: int, features: int) -> None:
    monkeypatch.setitem(sae_module.TILE_TOKENS, "cpu", tokens)
    monkeypatch.setitem(sae_module.TILE_FEATURES, "cpu", features)


@pytest.mark.parametrize("pre_bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gate", GATES)
def test_encode_and_reconstruct_are_the_formulas(gate, transform, pre_bias):
    sae, x = random_sae(gate, transform, pre_bias=pre_bias), random_x()
    expected, reconstruction = literal(sae, x)
    codes = sae.encode(x)
    assert 0 < len(codes) == np.count_nonzero(expected) < expected.size
    np.testing.assert_allclose(dense(codes), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(x, codes), reconstruction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_codes_are_positive_and_sorted_by_feature_then_row_then_position(gate):
    codes = random_sae(gate).encode(random_x())
    keys = list(zip(codes.feature, codes.row, codes.position, strict=True))
    assert keys == sorted(set(keys))
    assert (codes.value > 0).all()


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (4, F), (B * T, 5), (8, 3), (1000, F - 1)])
@pytest.mark.parametrize("gate", GATES)
def test_small_tiles_change_nothing(gate, tokens, features, monkeypatch):
    sae, x = random_sae(gate, "layer_norm", pre_bias=True), random_x()
    whole = sae.encode(x)
    set_tiles(monkeypatch, tokens, features)
    assert_same(sae.encode(x), whole)


@given(
    bias=st.lists(st.integers(-2, 3), min_size=1, max_size=12),
    k=st.integers(1, 14),
    tile=st.integers(1, 12),
)
def test_topk_breaks_ties_by_the_lowest_feature_in_and_across_tiles(bias, k, tile):
    # Without weights every token's pre is the bias, exactly.
    num_features = len(bias)
    sae = SparseAutoencoder(
        w_enc=torch.zeros(D, num_features),
        b_enc=torch.tensor(bias, dtype=torch.float32),
        w_dec=torch.zeros(num_features, D),
        b_dec=torch.zeros(D),
        gate=TopK(k),
    )
    best = sorted(range(num_features), key=lambda feature: (-bias[feature], feature))[:k]
    expected = sorted(feature for feature in best if bias[feature] > 0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_tiles(monkeypatch, 2, tile)
        codes = sae.encode(random_x(1))
    assert codes.feature.tolist() == [feature for feature in expected for _ in range(T)]
    assert codes.value.tolist() == [bias[feature] for feature in expected for _ in range(T)]


def test_a_wide_topk_breaks_ties_by_the_lowest_feature_as_well():
    # torch.topk takes other paths for wide rows; here every second feature ties.
    num_features, k = 3000, 100
    sae = SparseAutoencoder(
        w_enc=torch.zeros(D, num_features),
        b_enc=(torch.arange(num_features) % 2).float(),
        w_dec=torch.zeros(num_features, D),
        b_dec=torch.zeros(D),
        gate=TopK(k),
    )
    assert sae.encode(random_x(1)).feature.reshape(k, T).tolist() == [[2 * n + 1] * T for n in range(k)]


@pytest.mark.parametrize("k", [F, F + 1, 10 * F])
@pytest.mark.parametrize("tile", [4, F])
def test_topk_of_all_features_is_a_relu(k, tile, monkeypatch):
    relu = random_sae("relu")
    topk = SparseAutoencoder(w_enc=relu.w_enc, b_enc=relu.b_enc, w_dec=relu.w_dec, b_dec=relu.b_dec, gate=TopK(k))
    set_tiles(monkeypatch, 512, tile)
    assert_same(topk.encode(random_x()), relu.encode(random_x()))


@pytest.mark.parametrize("gate", GATES)
def test_signed_codes_are_the_positive_codes_where_a_gate_ends_in_a_relu(gate):
    sae, x = random_sae(gate), random_x()
    assert_same(sae.encode(x, signed=True), sae.encode(x))


@pytest.mark.parametrize("tile", [3, F])
def test_a_topk_without_relu_keeps_negative_codes_for_those_who_ask(tile, monkeypatch):
    k = F - 3
    sae, x = replace(random_sae("topk"), gate=TopK(k, "identity")), random_x()
    set_tiles(monkeypatch, 8, tile)
    signed = sae.encode(x, signed=True)
    pre = exact(x) @ exact(sae.w_enc) + exact(sae.b_enc)
    kept = np.where(pre >= np.sort(pre, axis=-1)[..., [-k]], pre, 0)
    np.testing.assert_allclose(dense(signed), kept, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(x, signed), kept @ exact(sae.w_dec) + exact(sae.b_dec), atol=1e-4)
    assert (signed.value < 0).any()
    assert_same(sae.encode(x), signed.where(signed.value > 0))


def test_topk_keeps_fewer_than_k_where_fewer_are_positive():
    sae = random_sae("topk")
    sae.b_enc.fill_(-1000.0)[3] = 1000.0
    codes = sae.encode(random_x())
    assert set(codes.feature.tolist()) == {3}
    assert len(codes) == B * T


def test_a_jumprelu_code_is_strictly_above_its_threshold_and_above_zero():
    sae = SparseAutoencoder(
        w_enc=torch.zeros(D, 4),
        b_enc=torch.tensor([1.0, 1.0, -1.0, 0.0]),
        w_dec=torch.zeros(4, D),
        b_dec=torch.zeros(D),
        gate=JumpRelu(torch.tensor([1.0, 0.5, -2.0, -1.0])),
    )
    assert set(sae.encode(random_x()).feature.tolist()) == {1}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gate", GATES)
def test_half_precision_activations_are_encoded_in_float32(gate, transform):
    sae, x = random_sae(gate, transform), random_x()
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        codes = sae.encode(half)
        assert_same(codes, sae.encode(half.float()))
        reconstruction = sae.reconstruct(half, codes)
        assert reconstruction.dtype == torch.float32
        assert torch.equal(reconstruction, sae.reconstruct(half.float(), codes))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_first_row_moves_the_rows_and_nothing_else(transform):
    sae, x = random_sae("topk", transform), random_x()
    codes, moved = sae.encode(x), sae.encode(x, first_row=1_000_000)
    np.testing.assert_array_equal(moved.row, codes.row + 1_000_000)
    for name in ("feature", "position", "value"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(codes, name))
    assert torch.equal(sae.reconstruct(x, moved, first_row=1_000_000), sae.reconstruct(x, codes))


def test_batches_give_the_codes_that_the_whole_gives():
    sae, x = random_sae("jumprelu", "layer_norm"), random_x()
    parts = [dense(sae.encode(x[:2]), 2), dense(sae.encode(x[2:]), B - 2)]
    np.testing.assert_allclose(np.concatenate(parts), dense(sae.encode(x)), rtol=1e-5, atol=1e-6)


def test_tokens_without_codes_are_reconstructed_from_the_bias_alone():
    sae = random_sae("relu")
    sae.b_enc.fill_(-1000.0)
    x = random_x()
    codes = sae.encode(x)
    assert len(codes) == 0
    assert torch.equal(sae.reconstruct(x, codes), sae.b_dec.expand_as(x))


def test_codes_that_were_left_out_are_missing_from_the_reconstruction():
    sae, x = random_sae("relu"), random_x()
    codes = sae.encode(x)
    odd = codes.feature % 2 == 1
    even = dense(codes.where(~odd)) @ sae.w_dec.numpy() + sae.b_dec.numpy()
    np.testing.assert_allclose(sae.reconstruct(x, codes.where(~odd)), even, rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_has_no_codes_under_a_rescaled_norm():
    x = random_x()
    x[1, 2] = 0
    for gate in GATES:
        codes = random_sae(gate, "constant_norm_rescale").encode(x)
        assert not ((codes.row == 1) & (codes.position == 2)).any()
        assert np.isfinite(codes.value).all()


def test_decoder_norms_are_the_lengths_of_the_decoder_rows():
    sae = random_sae("relu")
    np.testing.assert_allclose(sae.decoder_norms(), np.linalg.norm(exact(sae.w_dec), axis=1), rtol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_every_tensor_moves_to_the_device(gate):
    moved = random_sae(gate, pre_bias=True).to(torch.device("meta"))
    tensors = [getattr(part, name) for part in (moved, moved.gate) for name in type(part).__slots__]
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}
    assert devices == {"meta"}


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("gate", [TopK(8), JumpRelu(torch.full((4096,), 9.0))], ids=["topk", "jumprelu"])
def test_encode_never_forms_an_array_of_tokens_by_features(gate, monkeypatch):
    num_features, tile_tokens, tile_features = 4096, 16, 256
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(
        w_enc=torch.randn(2, num_features, generator=generator),
        b_enc=torch.zeros(num_features),
        w_dec=torch.zeros(num_features, 2),
        b_dec=torch.zeros(2),
        gate=gate,
    )
    x = 3 * torch.randn(8, 16, 2, generator=generator)
    set_tiles(monkeypatch, tile_tokens, tile_features)
    with LargestResult() as largest:
        codes = sae.encode(x)
    assert 500 < len(codes) < x.shape[0] * x.shape[1] * num_features / 20
    assert largest.numel <= max(tile_tokens * tile_features, 2 * len(codes))  # feature and token in one array
