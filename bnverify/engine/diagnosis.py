"""From the laws that are broken to the mistake that usually breaks them."""

from __future__ import annotations

from collections.abc import Collection

from bnverify.laws import LAWS, Law
from bnverify.mistakes import MISTAKES, Mistake


def likeliest(law: Law, violated: Collection[str]) -> list[Mistake]:
    """Return the mistakes that break ``law``, the likeliest first.

    A mistake is the likelier the more of the laws that name it are broken, and, among equals,
    the earlier the law itself names it.

    Args:
        law: a broken law.
        violated: the names of all broken laws.
    """

    def rank(name: str) -> tuple[float, int]:
        naming = [other.name for other in LAWS.values() if name in other.mistakes]
        broken = sum(other in violated for other in naming)
        return (-broken / max(len(naming), 1) - 0.1 * broken, law.mistakes.index(name))

    return [MISTAKES[name] for name in sorted(law.mistakes, key=rank)]


def diagnose(law: Law, violated: Collection[str]) -> str:
    """Return the likeliest mistake and its mend, and what else it may be, in a few lines."""
    mistakes = likeliest(law, violated)
    if not mistakes:
        return "no common mistake is known to break this law"
    first, *others = mistakes
    text = f"{first.name}: {first.title}. Mend: {first.mend}."
    if first.source:
        text += f" Seen at {first.source}"
    if others:
        text += " Or " + "; or ".join(other.title for other in others[:2]) + "."
    return text
