"""Safe Latent Diffusion (CVPR 2023): guidance away from a concept, only where and as far as a picture moves towards it."""
