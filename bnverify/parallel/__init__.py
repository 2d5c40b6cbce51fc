"""The same step on one device and on many: what synchronised statistics must agree on."""
