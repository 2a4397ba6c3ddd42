"""From the rows of a run to frames, figures, a report and Weights & Biases. No torch, no Megatron."""
