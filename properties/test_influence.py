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


def test_step_moves_the_params(step):
    """The step changes the params."""
    step.shows("step_moves_the_params", step.cases())


def test_step_moves_the_statistics(step):
    """The step changes the running statistics."""
    step.shows("step_moves_the_statistics", step.cases())
