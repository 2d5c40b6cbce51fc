"""Structure: which trees go into a step and come out. Read off its trace, so for every N and D."""


def test_gradients_match_params(step):
    """There is one gradient for each parameter, of its shape and dtype, and no other."""
    step.proves("gradients_match_params")


def test_params_keep_their_tree(step):
    """The new params have the structure, shapes and dtypes of the old ones."""
    step.proves("params_keep_their_tree")


def test_batch_stats_keep_their_tree(step):
    """The new batch_stats have the structure, shapes and dtypes of the old ones."""
    step.proves("batch_stats_keep_their_tree")


def test_params_hold_no_statistics(step):
    """No running statistic is among the params."""
    step.proves("params_hold_no_statistics")


def test_optimizer_state_is_that_of_params(step):
    """The optimizer's state is what ``tx.init(params)`` makes, not ``tx.init(variables)``."""
    step.proves("optimizer_state_is_that_of_params")


def test_optimizer_state_excludes_batch_stats(step):
    """The optimizer's state holds no leaf for a running statistic."""
    step.proves("optimizer_state_excludes_batch_stats")


def test_training_loss_is_a_scalar(step):
    """The training loss has shape ()."""
    step.proves("training_loss_is_a_scalar")


def test_eval_loss_has_shape_one(step):
    """The eval loss is one number, of shape () or (1,)."""
    step.proves("eval_loss_has_shape_one")


def test_batch_stats_are_float32(step):
    """Running statistics are kept in float32."""
    step.proves("batch_stats_are_float32")


def test_state_signature_is_a_fixed_point(step):
    """The next step can take what this one returns without being compiled again."""
    step.proves("state_signature_is_a_fixed_point")
