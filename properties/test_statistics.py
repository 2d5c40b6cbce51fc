"""Running statistics: a moving average of each batch's own mean and variance, nothing else."""

from hypothesis import given
from hypothesis import strategies as st

STEPS_OF = ("sgd", "adam")  # the forward pass writes them; no optimizer has a part in it


@given(data=st.data())
def test_batch_stats_change_only_by_ema(step, data):
    """Each statistic becomes m * old + (1 - m) * b, with m and b free of the old value."""
    step.keeps("batch_stats_change_only_by_ema", data.draw(step.cases()))


@given(data=st.data())
def test_one_momentum_for_the_whole_model(step, data):
    """The weight m of the old value is one number in [0, 1) for all layers."""
    step.keeps("one_momentum_for_the_whole_model", data.draw(step.cases()))


@given(data=st.data())
def test_momentum_is_as_declared(step, data):
    """That m is the declared one: the average is taken once, and not the other way round."""
    step.keeps("momentum_is_as_declared", data.draw(step.cases()))


@given(data=st.data())
def test_batch_moments_are_the_layers_own(step, data):
    """What enters is the mean and the biased variance (divisor N) of the layer's own input."""
    step.keeps("batch_moments_are_the_layers_own", data.draw(step.cases()))


def test_unlike_rows_have_a_variance(step):
    """Rows that differ give a running variance above 0."""
    step.shows("unlike_rows_have_a_variance", step.cases())


@given(data=st.data())
def test_batch_stats_are_free_of_targets(step, data):
    """The statistics do not depend on the targets."""
    step.keeps("batch_stats_are_free_of_targets", data.draw(step.cases()))


@given(data=st.data())
def test_variance_is_never_negative(step, data):
    """A running variance stays at or above zero."""
    step.keeps("variance_is_never_negative", data.draw(step.cases()))


@given(data=st.data())
def test_batch_like_the_statistics_is_a_fixed_point(step, data):
    """Running statistics that equal the batch's moments do not change."""
    step.keeps("batch_like_the_statistics_is_a_fixed_point", data.draw(step.cases()))


@given(data=st.data())
def test_equal_steps_converge_geometrically(step, data):
    """The same batch once more is folded in once more, by the same m."""
    step.keeps("equal_steps_converge_geometrically", data.draw(step.cases()))


@given(data=st.data())
def test_initial_statistics_are_zero_and_one(step, data):
    """Before the first step every running mean is 0 and every running variance 1."""
    step.keeps("initial_statistics_are_zero_and_one", data.draw(step.first_steps()))


@given(data=st.data())
def test_statistics_stay_finite(step, data):
    """No batch within the domain makes a statistic infinite or NaN."""
    step.keeps("statistics_stay_finite", data.draw(step.first_steps()))
