"""The update: params change by the optimizer's update for the gradient of the loss."""

from hypothesis import given
from hypothesis import strategies as st


@given(data=st.data())
def test_params_follow_the_optimizer(step, data):
    """The new params are optax.apply_updates(params, updates), with updates from tx.update."""
    step.keeps("params_follow_the_optimizer", data.draw(step.cases()))


@given(data=st.data())
def test_optimizer_state_follows_the_optimizer(step, data):
    """The new optimizer state is the one that tx.update returns."""
    step.keeps("optimizer_state_follows_the_optimizer", data.draw(step.cases()))


@given(data=st.data())
def test_zero_learning_rate_moves_nothing(step, data):
    """With lr = 0, params stay bit-identical."""
    step.keeps("zero_learning_rate_moves_nothing", data.draw(step.cases()))


@given(data=st.data())
def test_sgd_moves_params_by_minus_lr_times_gradient(step, data):
    """Under plain SGD the new params are old - lr * gradient, within two roundings."""
    step.keeps("sgd_moves_params_by_minus_lr_times_gradient", data.draw(step.cases()))


@given(data=st.data())
def test_gradients_equal_the_hand_derivation(step, data):
    """Every gradient equals the hand-derived one in float64, within rounding."""
    step.keeps("gradients_equal_the_hand_derivation", data.draw(step.cases()))


@given(data=st.data())
def test_training_loss_equals_the_hand_derivation(step, data):
    """The training loss equals the hand-derived one in float64, within rounding."""
    step.keeps("training_loss_equals_the_hand_derivation", data.draw(step.cases()))


@given(data=st.data())
def test_gradients_are_gradients_of_the_loss(step, data):
    """The gradient equals the slope of the reported loss along a random direction of params."""
    step.keeps("gradients_are_gradients_of_the_loss", data.draw(step.cases()))


@given(data=st.data())
def test_bias_before_norm_has_no_gradient(step, data):
    """A bias added right before a normalisation has a gradient of 0, within rounding."""
    step.keeps("bias_before_norm_has_no_gradient", data.draw(step.cases()))
