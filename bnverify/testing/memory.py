"""The last failure of a test, kept where Hypothesis keeps its own: in the example database.

So whatever shares that database between machines shares these as well.
"""

from __future__ import annotations

import hashlib
import json

from hypothesis import settings

from bnverify.evidence import Evidence


class Memory:
    """What the example database holds of the failure of one test.

    Args:
        nodeid: the test.
    """

    def __init__(self, nodeid: str) -> None:
        # None in Hypothesis's own profile for CI; then nothing is remembered.
        self._database = settings().database
        self._key = b"bnverify/" + hashlib.sha256(nodeid.encode()).hexdigest()[:32].encode()

    def recall(self) -> Evidence | None:
        """Return the evidence of the last failure; of several, any."""
        for value in sorted(self._database.fetch(self._key)) if self._database else ():
            try:
                return Evidence.from_json(json.loads(value))
            except (ValueError, TypeError, KeyError):  # nothing of ours, or of another release
                continue
        return None

    def keep(self, evidence: Evidence) -> None:
        """Remember the evidence of a failure in the place of an older one."""
        if self._database and evidence.counterexample:
            self.forget()
            text = json.dumps(evidence.to_json(), sort_keys=True)
            self._database.save(self._key, text.encode())

    def forget(self) -> None:
        """Forget it again."""
        if self._database:
            for value in list(self._database.fetch(self._key)):
                self._database.delete(self._key, value)
