"""MACE, mass concept erasure (arXiv:2403.06135)."""
