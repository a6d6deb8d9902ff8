"""Trackers: TensorBoard, W&B and what else accelerate knows, hear of runs."""
