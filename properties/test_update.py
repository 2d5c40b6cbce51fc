"""The update: params and optimizer state move as the optimizer says."""

from hypothesis import given
from hypothesis import strategies as st

EVERYWHERE = ("sgd", "adam")  # one without a state, and one with much


@given(data=st.data())
def test_params_follow_the_optimizer(step, data):
    """The new params are the old ones plus what the optimizer makes of the gradient."""
    step.keeps("params_follow_the_optimizer", data.draw(step.cases()))


@given(data=st.data())
def test_optimizer_state_follows_the_optimizer(step, data):
    """The new optimizer state is the one the optimizer returned."""
    step.keeps("optimizer_state_follows_the_optimizer", data.draw(step.cases()))


@given(data=st.data())
def test_zero_learning_rate_moves_nothing(step, data):
    """With a learning rate of 0 the params stay, to the bit."""
    step.keeps("zero_learning_rate_moves_nothing", data.draw(step.cases()))


@given(data=st.data())
def test_sgd_moves_params_by_minus_lr_times_gradient(step, data):
    """Plain SGD: new = old - lr * gradient, to the last place or two."""
    step.keeps("sgd_moves_params_by_minus_lr_times_gradient", data.draw(step.cases()))
