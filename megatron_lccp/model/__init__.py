"""Models on Megatron-Core: `families` say what they are, `resolved` which one a configuration means, `shape` what each
layer consists of; `build` makes them. `attention`, `flash`, `norm` are portable parts; `quantize` makes them FP8."""
