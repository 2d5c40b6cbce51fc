"""bnverify in a user's own tests: the suite, the pytest plugin, known failures."""
