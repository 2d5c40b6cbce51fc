"""Flax's own examples violate no law, and the laws of the statistics apply to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax_examples as examples
import jax
import pytest

import bnverify
from bnverify.adapters.batches import classes
from bnverify.profile import Profile

FEW = Profile("few", tiny=1, shapes=0, block=32, examples=2)
LAWS = ("structure", "influence", "statistics", "update", "evaluation")


def images(x: Any, y: Any) -> dict[str, Any]:
    """Return a batch of images of 4 x 4 pixels."""
    return {"image": x.reshape(-1, 4, 4, 1), "label": classes(y, examples.CLASSES)}


def vectors(x: Any, y: Any) -> dict[str, Any]:
    """Return a batch of rows."""
    return {"image": x, "label": classes(y, examples.CLASSES)}


def imagenet() -> bnverify.Subject:
    """Return the loop around ``pmap``, in the form that scales its loss."""
    return bnverify.train_state(
        functools.partial(examples.create_train_state, half=True),
        jax.pmap(examples.imagenet_step, axis_name="batch"),
        jax.pmap(examples.imagenet_eval, axis_name="batch"),
        batch=images,
        features=16,
    )


def guide() -> bnverify.Subject:
    """Return the guide's loop."""
    return bnverify.train_state(
        examples.guide_state,
        examples.guide_step,
        examples.guide_eval,
        batch=vectors,
        features=3,
    )


def nnx_guide() -> bnverify.Subject:
    """Return the guide's loop in nnx."""
    return bnverify.nnx_loop(
        examples.make_mlp,
        examples.nnx_guide_step,
        examples.nnx_guide_eval,
        batch=vectors,
        features=3,
    )


def mnist() -> bnverify.Subject:
    """Return the nnx loop whose steps return nothing."""
    return bnverify.nnx_loop(
        examples.make_cnn, examples.mnist_step, examples.mnist_eval, batch=images, features=16
    )


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        # A TrainState loop like that of examples/train_state, of a deeper model.
        pytest.param(imagenet, 0.9, id="imagenet", marks=pytest.mark.nightly),
        pytest.param(nnx_guide, 0.99, id="nnx-guide"),
        # The same guide in linen, and a loop like that of examples/nnx_loop.
        pytest.param(guide, 0.99, id="guide", marks=pytest.mark.nightly),
        pytest.param(mnist, 0.99, id="mnist", marks=pytest.mark.nightly),
    ],
)
def test_an_example_is_right(make: Callable[[], bnverify.Subject], momentum: float) -> None:
    """Momentum and optimizer are found, and no law of the statistics is untriggered."""
    subject = make()
    assert subject.momentum == momentum
    report = bnverify.verify(subject, profile=FEW, select=LAWS)
    status = {each.law: each.status for each in report.results}
    assert [law for law, found in status.items() if found == "violated"] == []
    for law in (
        "momentum_is_as_declared",
        "batch_moments_are_the_layers_own",
        "eval_uses_the_running_statistics",
        "optimizer_state_excludes_batch_stats",
    ):
        assert status[law] in {"held", "proved"}, (law, status[law])
