"""ESD, erasing concepts from diffusion models (arXiv:2303.07345)."""
