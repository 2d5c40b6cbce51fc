"""Influence: what must not reach the result of a step, and what must."""

from hypothesis import given
from hypothesis import strategies as st


@given(data=st.data())
def test_training_is_free_of_old_statistics(step, data):
    """Other running statistics before the step: the same params, optimizer state and loss after."""
    step.keeps("training_is_free_of_old_statistics", data.draw(step.cases()))


@given(data=st.data())
def test_eval_statistics_are_the_ones_passed_in(step, data):
    """Evaluation hands back the running statistics it was given."""
    step.keeps("eval_statistics_are_the_ones_passed_in", data.draw(step.cases()))


def test_targets_reach_the_params(step):
    """Other targets give other params."""
    step.shows("targets_reach_the_params", step.cases())


def test_targets_belong_to_their_rows(step):
    """Targets given to other rows give another training loss."""
    step.shows("targets_belong_to_their_rows", step.cases())


def test_inputs_reach_the_params(step):
    """Other inputs give other params."""
    step.shows("inputs_reach_the_params", step.cases())


def test_inputs_reach_the_statistics(step):
    """Other inputs give other running statistics."""
    step.shows("inputs_reach_the_statistics", step.cases())


def test_old_statistics_reach_the_new(step):
    """Other running statistics before the step give other ones after it."""
    step.shows("old_statistics_reach_the_new", step.cases())


def test_loss_reads_params_and_inputs(step):
    """Other params and other inputs give other training losses."""
    step.shows("loss_reads_params_and_inputs", step.cases())


def test_inputs_reach_the_evaluation(step):
    """Other inputs give another eval loss."""
    step.shows("inputs_reach_the_evaluation", step.cases())


def test_targets_reach_the_evaluation(step):
    """Other targets give another eval loss."""
    step.shows("targets_reach_the_evaluation", step.cases())


def test_step_moves_the_params(step):
    """The step changes the params."""
    step.shows("step_moves_the_params", step.cases())


def test_step_moves_the_statistics(step):
    """The step changes the running statistics."""
    step.shows("step_moves_the_statistics", step.cases())
