"""The gradients: the slope of the loss, to every param that can move it."""

from hypothesis import given
from hypothesis import strategies as st


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
