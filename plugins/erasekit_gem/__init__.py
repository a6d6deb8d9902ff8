"""GEM, attraction to an anchor and repulsion from the concept on flows (arXiv:2606.00140)."""
