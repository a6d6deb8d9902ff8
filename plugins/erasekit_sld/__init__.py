"""Safe Latent Diffusion (CVPR 2023): guidance away from a concept, only where and as far as an image moves towards it."""
