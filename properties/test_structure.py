"""Structure: the trees that a step takes and returns, read off its trace for all N and D."""


def test_gradients_match_params(step):
    """The gradients have the tree structure, shapes and dtypes of params."""
    step.proves("gradients_match_params")


def test_params_keep_their_tree(step):
    """The step keeps the tree structure, shapes and dtypes of params."""
    step.proves("params_keep_their_tree")


def test_batch_stats_keep_their_tree(step):
    """The step keeps the tree structure, shapes and dtypes of batch_stats."""
    step.proves("batch_stats_keep_their_tree")


def test_params_hold_no_statistics(step):
    """No leaf of params is a running statistic."""
    step.proves("params_hold_no_statistics")


def test_optimizer_state_is_that_of_params(step):
    """The optimizer state has the structure of ``tx.init(params)``, not ``tx.init(variables)``."""
    step.proves("optimizer_state_is_that_of_params")


def test_optimizer_state_excludes_batch_stats(step):
    """The optimizer state has no leaf for a running statistic."""
    step.proves("optimizer_state_excludes_batch_stats")


def test_training_loss_is_a_scalar(step):
    """The training loss has shape ()."""
    step.proves("training_loss_is_a_scalar")


def test_eval_loss_has_shape_one(step):
    """The eval loss is a single number, of shape () or (1,)."""
    step.proves("eval_loss_has_shape_one")


def test_batch_stats_are_float32(step):
    """Running statistics are float32."""
    step.proves("batch_stats_are_float32")


def test_state_signature_is_a_fixed_point(step):
    """The step returns a state that it accepts without being compiled again."""
    step.proves("state_signature_is_a_fixed_point")
