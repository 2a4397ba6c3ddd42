"""The run directory, written and read; W&B's files read back. No torch, no Megatron."""
