"""Pages: of one run, and of several side by side."""
