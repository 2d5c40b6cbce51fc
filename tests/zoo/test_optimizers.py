"""What is plain SGD, and what only looks like it."""

import pytest

from bnverify import reference, zoo
from bnverify.proof import is_plain_sgd, read


@pytest.mark.parametrize("name", ["masked_decay", "clipped", "lion"])
def test_a_decay_kept_to_the_kernels_is_no_plain_sgd(name: str) -> None:
    """An optimizer without a state is asked about the params' own tree: masks go by names and ranks."""
    subject = getattr(zoo, name)()
    abstract = read(subject).abstract
    assert abstract is not None
    assert not is_plain_sgd(subject, abstract)


def test_the_reference_is_plain_sgd() -> None:
    """Its change is minus the rate times the gradient, for every size."""
    abstract = read(reference.sgd()).abstract
    assert abstract is not None
    assert is_plain_sgd(reference.sgd(), abstract)
