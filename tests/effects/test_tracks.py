"""A track is the dense array of what its pieces brought, whatever way the sequence was cut and gone back."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_census.compute.effects.tracks import Track
from sae_census.compute.numbers.codes import Codes, sorted_codes
from sae_census.errors import ArgumentError

F = 5
FEW_VALUES = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])


def codes_of(dense: np.ndarray) -> Codes:
    """The codes of (B, T, F) floats."""
    rows, positions, features = np.nonzero(dense)
    token = rows.astype(np.int64) * dense.shape[1] + positions
    return sorted_codes(
        features.astype(np.int32), token, dense[rows, positions, features], num_positions=dense.shape[1]
    )


@st.composite
def pieces(draw: Any) -> list[tuple[int, np.ndarray]]:
    """(tokens before it, floats) of every piece; each begins anywhere in what is there."""
    num_rows, first, end, found = draw(st.integers(1, 3)), draw(st.integers(0, 3)), 0, []
    for _ in range(draw(st.integers(1, 4))):
        past = draw(st.integers(0, end))
        length = draw(st.integers(1, 4))
        values = draw(st.lists(FEW_VALUES, min_size=num_rows * length * F, max_size=num_rows * length * F))
        found.append((first + past, np.reshape(values, (num_rows, length, F)).astype(np.float32)))
        end = past + length
    return found


def told(given_pieces: list[tuple[int, np.ndarray]]) -> tuple[Track, np.ndarray]:
    """The track of the pieces, and the dense array beside it."""
    first = given_pieces[0][0]
    track, dense = Track(num_features=F, first=first), given_pieces[0][1][:, :0]
    for past, piece in given_pieces:
        track.extend(codes_of(piece), piece.shape[0], piece.shape[1], past)
        dense = np.concatenate([dense[:, : past - first], piece], axis=1)
    return track, dense


@given(pieces())
def test_a_piece_goes_on_at_its_place_and_replaces_what_was_there(given_pieces: Any) -> None:
    track, dense = told(given_pieces)
    assert track.end == given_pieces[0][0] + dense.shape[1]
    assert np.array_equal(track.sparse().to_dense().numpy(), dense)


@given(pieces(), st.integers(1, F + 2))
def test_top_features_are_those_of_a_sort_and_ties_go_to_the_lowest_id(given_pieces: Any, k: int) -> None:
    track, dense = told(given_pieces)
    found = track.top(k)
    for row, position in np.ndindex(dense.shape[:2]):
        z = dense[row, position]
        best = [feature for feature in np.argsort(-z, kind="stable") if z[feature] > 0][:k]
        padded = [*best, *[-1] * (min(k, F) - len(best))]
        assert found.indices[row, position].tolist() == padded
        assert found.values[row, position].tolist() == [z[feature] if feature >= 0 else 0 for feature in padded]


def test_many_rows_go_on_where_one_stopped_and_no_others_do() -> None:
    one, three = np.ones((1, 2, F), np.float32), np.full((3, 1, F), 2, np.float32)
    track = Track(num_features=F, first=0)
    track.extend(codes_of(one), 1, 2, 0)
    before = track.copy()
    track.extend(codes_of(three), 3, 1, 2)
    assert np.array_equal(track.sparse().to_dense().numpy(), np.concatenate([one.repeat(3, axis=0), three], axis=1))
    with pytest.raises(ArgumentError, match="a forward with 2 rows goes on where one with 3 stopped"):
        track.extend(codes_of(three[:2]), 2, 1, 3)
    assert torch.equal(before.sparse().to_dense(), torch.from_numpy(one)), "a copy goes on by itself"
