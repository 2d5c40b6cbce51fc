"""The laws, one module per family: registered claims, most of them functions of a Transition."""

# Importing a module registers its laws; the order here is the order in reports.
# isort: off
from bnverify.laws import structure, influence, statistics, update, evaluation, metamorphic
from bnverify.laws import life, parallel

# isort: on
from bnverify.laws.arithmetic import UNTRIGGERED
from bnverify.laws.law import LAWS, STEP_LAWS, Law
from bnverify.profile import FAMILIES

__all__ = ["FAMILIES", "LAWS", "STEP_LAWS", "UNTRIGGERED", "Law"]

del evaluation, influence, life, metamorphic, parallel, statistics, structure, update
