"""bnverify in a user's own tests: the suite, the pytest plugin and known failures as data."""
