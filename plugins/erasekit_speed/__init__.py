"""SPEED, erasure in the null space of what must stay (arXiv:2503.07392)."""
