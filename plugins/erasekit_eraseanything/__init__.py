"""EraseAnything, concept erasure in rectified flow transformers (arXiv:2412.20413)."""
