"""Ranks: Megatron-Core's process groups (`groups`), collectives over them (`gather`), Megatron-Core without CUDA (`cpu`)."""
