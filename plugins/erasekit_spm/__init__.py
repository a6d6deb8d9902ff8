"""SPM, one-dimensional adapters with latent anchoring (arXiv:2312.16145)."""
