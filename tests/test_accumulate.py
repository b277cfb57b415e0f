import numpy as np
import pytest

from fourierbias import FourierBiasError
from fourierbias.accumulate import Moments


def filled(values, **options):
    moments = Moments(values.shape[1], **options)
    moments.update(values)
    return moments


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(3, 2, size=(11, 4))


def test_moments_are_those_of_numpy(values):
    moments = filled(values)
    np.testing.assert_allclose(moments.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(values.T), rtol=1e-11)
    np.testing.assert_allclose(moments.standard_error, values.std(0, ddof=1) / np.sqrt(11), rtol=1e-11)


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("cut", [1, 4, 10])
def test_uneven_batches_merges_and_states_give_the_one_shot_result(values, cut, covariance):
    whole = filled(values, covariance=covariance)
    batched = filled(values[:cut], covariance=covariance)
    batched.update(values[cut:])
    merged = filled(values[:cut], covariance=covariance)
    merged.merge(Moments.from_state(filled(values[cut:], covariance=covariance).state()))
    for other in (batched, merged):
        assert other.count == whole.count
        np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(other.variance, whole.variance, rtol=1e-11)
    half = filled(values[:5], covariance=covariance)
    assert not np.allclose(half.mean, whole.mean)


def test_from_state_does_not_share_memory(values):
    moments = filled(values)
    copy = Moments.from_state(moments.state())
    copy.update(values)
    assert moments.count == 11
    np.testing.assert_allclose(moments.mean, values.mean(0))


def test_rows_that_are_not_finite_are_left_out_and_counted(values):
    spoiled = values.copy()
    spoiled[2, 1], spoiled[5, 0] = np.nan, np.inf
    moments = filled(spoiled)
    assert (moments.count, moments.rejected) == (9, 2)
    np.testing.assert_allclose(moments.mean, np.delete(values, [2, 5], axis=0).mean(0))


def test_too_few_images_have_no_error():
    empty, one = Moments(2), filled(np.ones((1, 2)))
    assert np.isnan(empty.mean).all()
    assert np.isnan(empty.standard_error).all()
    assert np.isnan(one.standard_error).all()
    np.testing.assert_array_equal(one.mean, 1)


def test_merge_refuses_other_sizes():
    with pytest.raises(FourierBiasError, match="2 and 3"):
        Moments(2).merge(Moments(3))
