"""Grids of runs: what a suite asks for, who works on it and where, and the table that comes of it."""
