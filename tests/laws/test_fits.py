"""Sums of the fit sample: however tokens are shared out, they merge to the same sums, and to the formula's FVU."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.fits import FitSums

D, MOST = 3, 6


def sums_of(x: np.ndarray, error: np.ndarray, num_codes: np.ndarray) -> FitSums:
    """Of (T, D) activations, the (T, D) errors of their reconstructions, and the number of codes of each token."""

    def total(values: np.ndarray) -> np.ndarray:
        """Of (T, N) values; (N, 2) limbs, added token by token."""
        limbs = fixed.zeros(values.shape[1])
        for row in values.astype(np.float64):
            limbs = fixed.add(limbs, fixed.segment_sums(row, np.arange(len(row)), fixed.SUM_SCALE))
        return limbs

    return FitSums(
        l0_histogram=np.bincount(num_codes, minlength=MOST),
        fit_tokens=np.array([len(x)]),
        fit_error=total(np.square(error).sum(axis=1, keepdims=True)),
        fit_square=total(np.square(x).sum(axis=1, keepdims=True)),
        fit_vector=total(x),
    )


@st.composite
def samples(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_tokens = draw(st.integers(2, 6))
    numbers = st.lists(st.integers(-64, 64), min_size=num_tokens * D, max_size=num_tokens * D)
    x, error = (np.reshape(draw(numbers), (num_tokens, D)) / 16 for _ in range(2))
    return x, error, np.array(draw(st.lists(st.integers(0, MOST - 1), min_size=num_tokens, max_size=num_tokens)))


@given(samples(), st.data())
def test_sums_do_not_care_how_tokens_were_shared_out(sample: Any, data: Any) -> None:
    whole = sums_of(*sample).arrays()
    side = np.array(data.draw(st.lists(st.booleans(), min_size=len(sample[0]), max_size=len(sample[0]))))
    one, other = (sums_of(*(part[mine] for part in sample)) for mine in (side, ~side))
    for merged in (one.merge(other), other.merge(one)):
        assert all(np.array_equal(array, whole[name]) for name, array in merged.arrays().items())


@given(samples())
def test_the_unexplained_fraction_is_that_of_the_formula(sample: Any) -> None:
    x, error, _ = sample
    variance = np.square(x - x.mean(axis=0)).sum()
    found = sums_of(*sample).unexplained()
    if variance == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.square(error).sum() / variance, rel=1e-6)


def test_no_tokens_have_no_unexplained_fraction() -> None:
    assert math.isnan(sums_of(np.zeros((0, D)), np.zeros((0, D)), np.zeros(0, np.int64)).unexplained())
