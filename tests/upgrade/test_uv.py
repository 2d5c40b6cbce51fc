"""What uv's last words are taken to mean, in the words of older and of newer releases."""

from __future__ import annotations

import pytest

from bnverify.upgrade import uv

SAID = {
    "python": """error: No solution found when resolving dependencies
  cause: Because the current Python version (3.11.7) does not satisfy Python>=3.12 and flax==0.12.12
         depends on Python>=3.12, we can conclude that flax==0.12.12 cannot be used.""",
    "wheels": """  x No solution found when resolving dependencies:
  ╰─▶ Because jaxlib==0.4.13 has no wheels with a matching Python ABI tag (e.g., `cp312`) and you
      require jaxlib==0.4.13, we can conclude that your requirements are unsatisfiable.""",
    "version": """  cause: Because there is no version of jax==0.99.1 and you require jax==0.99.1, we can
      conclude that your requirements are unsatisfiable.""",
    "range": """  cause: Because only jaxlib>=0.4.13 is available and you require jaxlib<0.4.13, we can
      conclude that your requirements are unsatisfiable.""",
    "name": "  cause: Because x was not found in the package registry and you require x, ...",
    "clash": "Because flax==0.12.8 depends on jax>=0.10.0 and you require jax==0.4.30, ...",
    "hash": "error: Failed to download `toolz==1.0.0`\n  cause: Hash mismatch for `toolz==1.0.0`",
    "network": "error: Request failed after 3 retries in 5.9s\n  cause: error sending request for url",
    "syntax": "error: Couldn't parse requirement in `l.txt` at position 0",
    "disk": "error: failed to write to file: No space left on device (os error 28)",
    "build": "error: Failed to build `model @ file:///x`\n  cause: The build backend returned an error",
    "unknown": "error: something else",
}


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("python", "install a Python"),
        ("wheels", "install a Python"),
        ("version", "the name and the version exist"),
        ("range", "the name and the version exist"),
        ("name", "the name and the version exist"),
        ("clash", "releases that allow each other"),
        ("hash", "find out why"),
        ("network", "the package index can be reached"),
        ("syntax", "correct the requirement"),
        ("disk", "free space"),
        ("build", "builds with `uv build`"),
        ("unknown", "`uv pip compile` by itself"),
    ],
)
def test_each_failure_has_its_mend(said, mend):
    """The advice fits what went wrong."""
    assert mend in uv.UvError(SAID[said]).mend


@pytest.mark.parametrize("said", SAID)
def test_another_python_is_tried_only_where_it_may_help(said):
    """A version that does not exist does not exist on any Python."""
    assert uv.UvError(SAID[said]).wants_another_python == (said in {"python", "wheels"})


def test_the_last_words_are_what_follows_the_warnings():
    """The reason, whole if it is short, its two ends if it is not."""
    assert uv._last_words("warning: x\nerror: no\n  cause: y\n") == "error: no\n  cause: y"
    assert uv._last_words("words without the word") == "words without the word"
    long = "error: " + "a" * 5000 + "end"
    assert uv._last_words(long).startswith("error: a")
    assert uv._last_words(long).endswith("end")
    assert len(uv._last_words(long)) < 2100
