"""UCE, Unified Concept Editing (arXiv:2308.14761)."""
