"""Data-parallel steps, compared with the same step on one device."""
