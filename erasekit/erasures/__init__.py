"""What an erasure is, on disk and in a pipeline."""
