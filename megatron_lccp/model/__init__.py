"""Models on Megatron-Core: `families` say what they are, `build` makes them, `attention` and `norm` are the portable
parts, `taps` look inside attention, `forward` runs one for measuring, `weights` reads and writes whole models."""
