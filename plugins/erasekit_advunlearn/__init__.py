"""AdvUnlearn, erasing under prefixes that an attack finds at each step (arXiv:2405.15234)."""
