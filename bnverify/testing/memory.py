"""The last failure of each test, stored in Hypothesis's example database.

It is therefore shared between machines wherever that database is.
"""

from __future__ import annotations

import hashlib
import json

from hypothesis import settings

from bnverify.evidence import Evidence


class Memory:
    """The entry of one test in the example database.

    Args:
        nodeid: the test's node id.
    """

    def __init__(self, nodeid: str) -> None:
        # None in Hypothesis's "ci" profile; then nothing is stored.
        self._database = settings().database
        self._key = b"bnverify/" + hashlib.sha256(nodeid.encode()).hexdigest()[:32].encode()

    def recall(self) -> Evidence | None:
        """Return the evidence of the last failure, or None."""
        for value in sorted(self._database.fetch(self._key)) if self._database else ():
            try:
                return Evidence.from_json(json.loads(value))
            except (ValueError, TypeError, KeyError):  # written by another release
                continue
        return None

    def keep(self, evidence: Evidence) -> None:
        """Store the evidence of a failure, replacing an older one."""
        if self._database and evidence.counterexample:
            self.forget()
            text = json.dumps(evidence.to_json(), sort_keys=True)
            self._database.save(self._key, text.encode())

    def forget(self) -> None:
        """Delete the entry."""
        if self._database:
            for value in list(self._database.fetch(self._key)):
                self._database.delete(self._key, value)
