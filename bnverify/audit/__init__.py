"""``bnverify audit``: find the faults in a user's step that the user's tests would miss."""
