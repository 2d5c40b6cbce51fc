"""Laws about a state over many steps: train, evaluate, save, restore, copy and resume, in any order."""
