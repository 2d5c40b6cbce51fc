"""Found first on PYTHONPATH in the processes of ``bnverify audit --tests``, and run as they start.

It installs the substitution, then runs the sitecustomize that it hides, if there is one.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent


def _run_the_hidden_one() -> None:
    rest = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


try:
    from bnverify.audit import run
except ImportError:  # another interpreter, without bnverify: it imports nothing of the target's
    pass
else:
    run.install()
_run_the_hidden_one()
