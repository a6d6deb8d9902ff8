"""The mini world: its words, its model, its tasks and its judges."""
