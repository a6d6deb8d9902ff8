"""What is measured, with what, and how images are drawn for it."""
