"""Influence: which inputs of a step must, and must not, affect its results."""

from hypothesis import given
from hypothesis import strategies as st


@given(data=st.data())
def test_training_is_free_of_old_statistics(step, data):
    """The new params, optimizer state and training loss do not depend on the old batch_stats."""
    step.keeps("training_is_free_of_old_statistics", data.draw(step.cases()))


@given(data=st.data())
def test_eval_statistics_are_the_ones_passed_in(step, data):
    """Evaluation returns the batch_stats that it was given."""
    step.keeps("eval_statistics_are_the_ones_passed_in", data.draw(step.cases()))


def test_targets_reach_the_params(step):
    """Changing the targets changes the new params."""
    step.shows("targets_reach_the_params", step.cases())


def test_targets_belong_to_their_rows(step):
    """Assigning the targets to other rows changes the training loss."""
    step.shows("targets_belong_to_their_rows", step.cases())


def test_inputs_reach_the_params(step):
    """Changing the inputs changes the new params."""
    step.shows("inputs_reach_the_params", step.cases())


def test_inputs_reach_the_statistics(step):
    """Changing the inputs changes the new batch_stats."""
    step.shows("inputs_reach_the_statistics", step.cases())


def test_old_statistics_reach_the_new(step):
    """Changing the old batch_stats changes the new batch_stats."""
    step.shows("old_statistics_reach_the_new", step.cases())


def test_loss_reads_params_and_inputs(step):
    """Changing params changes the training loss, and so does changing the inputs."""
    step.shows("loss_reads_params_and_inputs", step.cases())


def test_inputs_reach_the_evaluation(step):
    """Changing the inputs changes the eval loss."""
    step.shows("inputs_reach_the_evaluation", step.cases())


def test_targets_reach_the_evaluation(step):
    """Changing the targets changes the eval loss."""
    step.shows("targets_reach_the_evaluation", step.cases())


def test_step_moves_the_params(step):
    """The step changes the params."""
    step.shows("step_moves_the_params", step.cases())


def test_step_moves_the_statistics(step):
    """The step changes the running statistics."""
    step.shows("step_moves_the_statistics", step.cases())
