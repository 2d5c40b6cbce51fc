"""The life of a state: train, evaluate, save, restore, copy and resume, in any order."""
