"""What model a configuration means: one answer, made once and passed on.

In: a `Config`, and the tokenizer's vocabulary where it is known. Out: `ResolvedModel`. No other file looks up a family
or applies `megatron.transformer` to it. Nothing is imported from torch or Megatron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_lccp.config.tree import Config
from megatron_lccp.model.families import Family, family_of
from megatron_lccp.model.shape import Shape


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a configuration, on any layout."""

    name: str
    """Of its family."""
    family: Family
    """What it is; `fields` win over its own."""
    fields: Mapping[str, Any]
    """Fields of TransformerConfig that make it, `megatron.transformer` applied."""
    precision: str
    """training.precision; `auto` only for what is planned for another machine."""
    vocab_multiple: int
    """The vocabulary is padded to a multiple of this."""
    vocab_size: int | None = None
    """Tokens; None before the tokenizer is known, if the family leaves them to it."""

    @cached_property
    def shape(self) -> Shape:
        """What its layers consist of; ask once its fields are checked."""
        return self.family.shape(self.fields)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, the same on every layout, so that a checkpoint and a loss do not depend on it."""
        return -(-self.vocabulary // self.vocab_multiple) * self.vocab_multiple

    @property
    def vocabulary(self) -> int:
        """Tokens, once they are known."""
        assert self.vocab_size is not None
        return self.vocab_size

    def of_vocabulary(self, size: int) -> ResolvedModel:
        """The same model with the tokenizer's vocabulary, where its family leaves that to it."""
        return dataclasses.replace(self, vocab_size=self.family.vocab_size or size)


def resolve(config: Config) -> ResolvedModel:
    """The model of a configuration, which may still be wrong. ValueError if there is no such family."""
    family = family_of(config.model.family)
    return ResolvedModel(
        name=config.model.family,
        family=family,
        fields=family.fields(config.megatron.transformer),
        precision=config.training.precision,
        vocab_multiple=config.model.vocab_multiple,
        vocab_size=family.vocab_size,
    )
