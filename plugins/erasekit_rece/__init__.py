"""RECE: rounds of closed-form adversarial embeddings and closed-form edits against them (arXiv:2407.12383)."""
