"""From a Subject to a Report: proofs, stacked cases, explicit cases, and what their verdicts say."""
