"""Weights in and out: Hugging Face's tensors, whole files, sharded directories, checkpoints of a training."""
