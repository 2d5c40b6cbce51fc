"""Evaluation: it reads the running statistics, returns one loss and writes nothing."""

from hypothesis import given
from hypothesis import strategies as st

STEPS_OF = ("sgd", "adam")  # no optimizer has a part in evaluation


@given(data=st.data())
def test_eval_loss_is_finite(step, data):
    """After one step on any batch in the domain the eval loss is finite."""
    step.keeps("eval_loss_is_finite", data.draw(step.first_steps()))


@given(data=st.data())
def test_eval_writes_nothing(step, data):
    """Evaluation leaves params, batch_stats and optimizer state bit-identical."""
    step.keeps("eval_writes_nothing", data.draw(step.cases()))


def test_eval_uses_the_running_statistics(step):
    """Changing batch_stats changes the eval loss."""
    step.shows("eval_uses_the_running_statistics", step.cases())


@given(data=st.data())
def test_eval_rows_are_independent(step, data):
    """The eval loss of a batch is the mean of the losses of its rows, each evaluated alone."""
    step.keeps("eval_rows_are_independent", data.draw(step.cases()))


@given(data=st.data())
def test_eval_at_the_batchs_own_moments_is_the_training_loss(step, data):
    """With the batch's own moments as running statistics, the eval loss equals the training loss."""
    step.keeps("eval_at_the_batchs_own_moments_is_the_training_loss", data.draw(step.cases()))


@given(data=st.data())
def test_eval_loss_equals_the_hand_derivation(step, data):
    """The eval loss equals the hand-derived one in float64, within rounding."""
    step.keeps("eval_loss_equals_the_hand_derivation", data.draw(step.cases()))


@given(data=st.data())
def test_eval_repeats_to_the_bit(step, data):
    """Evaluating twice gives bit-identical results."""
    step.keeps("eval_repeats_to_the_bit", data.draw(step.cases()))
