"""The training step as bnverify checks it: `bnverify check check.py:subject`."""

from train import CLASSES, SIZE, create, eval_step, train_step

import bnverify
from bnverify.adapters.batches import classes

subject = bnverify.train_state(
    create,
    train_step,
    eval_step,
    batch=lambda x, y: {"image": x.reshape(-1, SIZE, SIZE, 1), "label": classes(y, CLASSES)},
    same_loss=True,  # both steps report the mean cross-entropy
    features=SIZE * SIZE,
)
