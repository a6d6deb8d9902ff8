"""EraseFlow, trajectory balance with an anchor's trajectories (arXiv:2511.00804)."""
