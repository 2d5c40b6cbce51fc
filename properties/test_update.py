"""The update: params move as the optimizer says, along the gradient of the loss."""

from hypothesis import given
from hypothesis import strategies as st


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


@given(data=st.data())
def test_gradients_equal_the_hand_derivation(step, data):
    """Every gradient is the one derived by hand in float64, within rounding."""
    step.keeps("gradients_equal_the_hand_derivation", data.draw(step.cases()))


@given(data=st.data())
def test_training_loss_equals_the_hand_derivation(step, data):
    """The training loss is the one derived by hand in float64, within rounding."""
    step.keeps("training_loss_equals_the_hand_derivation", data.draw(step.cases()))


@given(data=st.data())
def test_gradients_are_gradients_of_the_loss(step, data):
    """Along any direction the gradient is the slope of the loss that the step reports."""
    step.keeps("gradients_are_gradients_of_the_loss", data.draw(step.cases()))


@given(data=st.data())
def test_bias_before_norm_has_no_gradient(step, data):
    """A normalisation takes a bias before it away again, so nothing can be learnt there."""
    step.keeps("bias_before_norm_has_no_gradient", data.draw(step.cases()))
