"""The tests; a package, so that ``tests.faults`` can be imported from the root of the checkout."""
