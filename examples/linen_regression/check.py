"""The training step as bnverify checks it: `bnverify check check.py:subject`."""

import optax
from model import Regressor, loss

import bnverify

subject = bnverify.linen(Regressor(), optimizer=optax.adam, loss=loss)
