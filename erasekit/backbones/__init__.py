"""The models that concepts are erased from."""
