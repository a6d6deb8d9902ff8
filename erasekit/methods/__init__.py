"""What erasure methods are made of."""
