"""Which rows of a padded vocabulary are tokens, and a GPTModel whose losses leave the others out.

In: the vocabulary of the model, and the logits or the columns of them that a tensor-parallel rank has. Out: how many of
these columns are tokens; losses whose softmax is over tokens alone. `model.vocab_multiple` adds rows beyond the model's
own vocabulary so that tensor parallelism divides them: they take no part in training, in monitors or in exports, so
that another multiple, or another layout, computes the same.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_lccp.model.rope import Rope

VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors of a checkpoint that have a row for each row of the vocabulary, padding included."""


def real_columns(vocabulary: int, tp_rank: int, columns: int) -> int:
    """Of the `columns` logits of a tensor-parallel rank, the first so many are of tokens."""
    return min(max(vocabulary - tp_rank * columns, 0), columns)


def vocabulary_of(model: GPTModel) -> int:
    """Tokens of a model; of one that somebody else built, all its rows."""
    return getattr(model, "vocabulary", model.vocab_size)


class MaskedGPT(GPTModel):
    """GPTModel as Megatron-Core has it, with losses over the vocabulary that is real."""

    vocabulary: int
    """Tokens of the model, padding not included; set once it is built."""
    own_rope: Rope
    """The rotary embedding that its weights were trained with; set once it is built."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [b, s] of logits [s, b, v]: of next tokens, in chunks or not, and of layers that predict further ones.

        The columns of padding become the lowest finite number, in place: e to its power is 0, so they add nothing to the
        sum over all ranks and get a gradient of exactly 0, and a rank with padding alone meets no infinity minus itself
        (as in Transformer Engine's kernel). Autograd needs not know: nothing keeps logits for a backward of their own.
        """
        real = real_columns(self.vocabulary, self.pg_collection.tp.rank(), logits.shape[-1])
        if real < logits.shape[-1]:
            with torch.no_grad():
                logits[..., real:] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)
