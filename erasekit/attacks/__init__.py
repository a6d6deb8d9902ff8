"""What tries to bring an erased concept back, and what it finds."""
