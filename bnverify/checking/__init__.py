"""The whole check of a step: the laws, the life of its state, and its run on many devices."""
