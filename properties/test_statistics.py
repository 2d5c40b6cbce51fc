"""Running statistics: a moving average of each batch's own mean and variance."""

from hypothesis import given
from hypothesis import strategies as st

STEPS_OF = ("sgd", "adam")  # the forward pass writes them; no optimizer has a part in it


@given(data=st.data())
def test_batch_stats_change_only_by_ema(step, data):
    """Each statistic becomes m * old + (1 - m) * b, with m and b independent of the old value."""
    step.keeps("batch_stats_change_only_by_ema", data.draw(step.cases()))


@given(data=st.data())
def test_one_momentum_for_the_whole_model(step, data):
    """All running statistics have the same momentum, a number in [0, 1)."""
    step.keeps("one_momentum_for_the_whole_model", data.draw(step.cases()))


@given(data=st.data())
def test_momentum_is_as_declared(step, data):
    """The measured momentum is the declared one."""
    step.keeps("momentum_is_as_declared", data.draw(step.cases()))


@given(data=st.data())
def test_batch_moments_are_the_layers_own(step, data):
    """The moments averaged are the mean and the biased variance (divisor N) of the layer's input."""
    step.keeps("batch_moments_are_the_layers_own", data.draw(step.cases()))


def test_unlike_rows_have_a_variance(step):
    """A batch of different rows has a batch variance above 0."""
    step.shows("unlike_rows_have_a_variance", step.cases())


@given(data=st.data())
def test_batch_stats_are_free_of_targets(step, data):
    """The statistics do not depend on the targets."""
    step.keeps("batch_stats_are_free_of_targets", data.draw(step.cases()))


@given(data=st.data())
def test_variance_is_never_negative(step, data):
    """A running variance does not become negative."""
    step.keeps("variance_is_never_negative", data.draw(step.cases()))


@given(data=st.data())
def test_batch_like_the_statistics_is_a_fixed_point(step, data):
    """Running statistics that equal the batch's moments do not change."""
    step.keeps("batch_like_the_statistics_is_a_fixed_point", data.draw(step.cases()))


@given(data=st.data())
def test_equal_steps_converge_geometrically(step, data):
    """A second step on the same batch with lr = 0 applies the same moving average again."""
    step.keeps("equal_steps_converge_geometrically", data.draw(step.cases()))


@given(data=st.data())
def test_initial_statistics_are_zero_and_one(step, data):
    """Before the first step every running mean is 0 and every running variance 1."""
    step.keeps("initial_statistics_are_zero_and_one", data.draw(step.first_steps()))


@given(data=st.data())
def test_statistics_stay_finite(step, data):
    """Finite running statistics stay finite for every batch in the domain."""
    step.keeps("statistics_stay_finite", data.draw(step.first_steps()))


def test_running_statistics_hold_float32_digits(step):
    """The running statistics have more digits than bfloat16 and float16."""
    step.shows("running_statistics_hold_float32_digits", step.cases())


@given(data=st.data())
def test_a_constant_feature_gives_a_finite_step(step, data):
    """A feature of 1000.1 or 0.1 in every row gives a finite loss and new state."""
    step.keeps("a_constant_feature_gives_a_finite_step", data.draw(step.first_steps()))
