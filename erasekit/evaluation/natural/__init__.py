"""What judges natural images: each evaluator in a file of its own, each with the packages and weights it needs."""
