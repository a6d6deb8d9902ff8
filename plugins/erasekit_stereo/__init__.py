"""STEREO, words that bring a concept back found in turns with erasing, and then erased at once (arXiv:2408.16807)."""
