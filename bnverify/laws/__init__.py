"""The laws: one module a family, each law a registered function of a Transition."""

from bnverify.laws import evaluation, influence, metamorphic, statistics, structure, update
from bnverify.laws.law import LAWS, UNTRIGGERED, Law

__all__ = ["LAWS", "UNTRIGGERED", "Law"]

# Imported so that their laws register; nothing else is wanted from them here.
del evaluation, influence, metamorphic, statistics, structure, update
