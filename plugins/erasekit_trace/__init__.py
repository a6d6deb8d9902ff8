"""TRACE, trajectory-constrained concept erasure (arXiv:2505.23312)."""
