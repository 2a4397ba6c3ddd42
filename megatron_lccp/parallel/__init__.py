"""Ranks: Megatron-Core's process groups (`groups`), collectives (`gather`), Megatron-Core without CUDA (`cpu`)."""
