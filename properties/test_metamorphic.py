"""Changes of the input, or of how the step is run, that must not matter beyond rounding."""

from hypothesis import given, settings
from hypothesis import strategies as st

STEPS_OF = ("sgd", "adam")  # one optimizer without a state, one with much

# Uncompiled, one case takes as long as fifty compiled ones.
few = settings(max_examples=max(2, settings().max_examples // 25))


@given(data=st.data())
def test_row_order_changes_nothing(step, data):
    """Reversing the rows of the batch."""
    step.keeps("row_order_changes_nothing", data.draw(step.cases()))


@given(data=st.data())
def test_doubling_the_batch_changes_nothing(step, data):
    """Repeating every row."""
    step.keeps("doubling_the_batch_changes_nothing", data.draw(step.cases()))


@given(data=st.data())
def test_shift_before_norm_changes_no_loss(step, data):
    """Adding a constant before the normalisation does not change the training loss."""
    step.keeps("shift_before_norm_changes_no_loss", data.draw(step.cases()))


@given(data=st.data())
def test_same_input_repeats_to_the_bit(step, data):
    """The same seed and batch give bit-identical results."""
    step.keeps("same_input_repeats_to_the_bit", data.draw(step.cases()))


def test_a_fresh_trace_gives_the_same(step):
    """A second trace of init and step computes the same."""
    step.proves("a_fresh_trace_gives_the_same")


@few
@given(data=st.data())
def test_step_leaves_its_inputs_alone(step, data):
    """The step does not modify or delete its arguments."""
    step.keeps("step_leaves_its_inputs_alone", data.draw(step.cases()))


@few
@given(data=st.data())
def test_jit_equals_eager(step, data):
    """Running the step with and without jax.jit."""
    step.keeps("jit_equals_eager", data.draw(step.cases()))


@given(data=st.data())
def test_vmap_equals_loop(step, data):
    """Running the step under jax.vmap over cases, and one case at a time."""
    step.keeps("vmap_equals_loop", data.draw(step.cases()))


@few
@given(data=st.data())
def test_float_seeds_act_as_their_integer_part(step, data):
    """A float seed and its integer part give bit-identical results."""
    step.keeps("float_seeds_act_as_their_integer_part", data.draw(step.cases()))


@few
@given(data=st.data())
def test_solution_is_init_step_evaluate(step, data):
    """The one-call function returns the eval loss after init and one step."""
    step.keeps("solution_is_init_step_evaluate", data.draw(step.cases()))
