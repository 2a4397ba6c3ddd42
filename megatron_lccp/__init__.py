"""Long-context continual pre-training on Megatron-Core that says, while it runs, whether the model has converged.

Data flows one way and imports point only left:
schema -> config -> parallel -> data -> model -> training -> monitors | records -> analysis; `cli` composes.
`records` and `analysis` need neither torch nor Megatron: a report needs only the rows of a run directory.
"""

__version__ = "0.1.0"
