"""The training step as bnverify checks it: `bnverify check check.py:subject`."""

from train import CLASSES, eval_step, make, train_step

import bnverify
from bnverify.adapters.batches import classes

subject = bnverify.nnx_loop(
    make,
    train_step,
    eval_step,
    batch=lambda x, y: {"x": x, "label": classes(y, CLASSES)},
    switch=False,  # these steps call train() and eval() themselves
)
