"""What bnverify is told of this project: `bnverify check check.py:subject`."""

from train import CLASSES, eval_step, make, train_step

from bnverify.adapters.batches import classes
from bnverify.adapters.nnx_loop import nnx_loop

subject = nnx_loop(
    make,
    train_step,
    eval_step,
    batch=lambda x, y: {"x": x, "label": classes(y, CLASSES)},
    switch=False,  # these steps call train() and eval() themselves
)
