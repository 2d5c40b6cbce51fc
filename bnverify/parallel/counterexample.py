"""The script that shows a violation on many devices."""

from __future__ import annotations

from bnverify.case import Case
from bnverify.parallel.subject import DEVICES, Parallel


def script(parallel: Parallel, law: str, case: Case, target: str | None) -> str:
    """Return a script that shows a violation; it must be run in a process of its own.

    Args:
        parallel: the step.
        law: the broken claim.
        case: the batch that breaks it.
        target: what ``bnverify.load`` is given; None: the reader puts the step in.
    """
    subject = f"bnverify.load({target!r})" if target else f"...  # {parallel.name}"
    return (
        "import os\n\n"
        "# before jax is imported\n"
        f'os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={DEVICES}"\n'
        "import bnverify\n\n"
        f"subject = {subject}\n"
        f"case = {case.code()}\n"
        f"bnverify.replay(subject, case, law={law!r})\n"
    )
