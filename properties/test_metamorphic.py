"""Changes of the input, or of the way of running, that change nothing but rounding."""

from hypothesis import given, settings
from hypothesis import strategies as st

STEPS_OF = ("sgd", "adam")  # one optimizer without a state, one with much

# Uncompiled, one case takes as long as fifty compiled ones.
few = settings(max_examples=max(2, settings().max_examples // 25))


@given(data=st.data())
def test_row_order_changes_nothing(step, data):
    """The rows of the batch in reverse."""
    step.keeps("row_order_changes_nothing", data.draw(step.cases()))


@given(data=st.data())
def test_doubling_the_batch_changes_nothing(step, data):
    """Every row twice."""
    step.keeps("doubling_the_batch_changes_nothing", data.draw(step.cases()))


@given(data=st.data())
def test_shift_before_norm_changes_no_loss(step, data):
    """A constant added before the normalisation: the same training loss."""
    step.keeps("shift_before_norm_changes_no_loss", data.draw(step.cases()))


@given(data=st.data())
def test_same_input_repeats_to_the_bit(step, data):
    """The same seed and batch again: the same bits."""
    step.keeps("same_input_repeats_to_the_bit", data.draw(step.cases()))


@few
@given(data=st.data())
def test_step_leaves_its_inputs_alone(step, data):
    """The step neither changes nor deletes the arrays it was given."""
    step.keeps("step_leaves_its_inputs_alone", data.draw(step.cases()))


@few
@given(data=st.data())
def test_jit_equals_eager(step, data):
    """Compiled and uncompiled."""
    step.keeps("jit_equals_eager", data.draw(step.cases()))


@given(data=st.data())
def test_vmap_equals_loop(step, data):
    """Vectorised over cases, and one at a time."""
    step.keeps("vmap_equals_loop", data.draw(step.cases()))


@few
@given(data=st.data())
def test_float_seeds_act_as_their_integer_part(step, data):
    """A seed with a fraction: the same bits as without."""
    step.keeps("float_seeds_act_as_their_integer_part", data.draw(step.cases()))


@few
@given(data=st.data())
def test_solution_is_init_step_evaluate(step, data):
    """The one-call function: initialise, one step, evaluate."""
    step.keeps("solution_is_init_step_evaluate", data.draw(step.cases()))
