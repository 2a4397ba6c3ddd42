"""What model a configuration means: one answer, made once and passed on.

In: a `Config`, and the tokenizer's vocabulary where it is known. Out: `ResolvedModel`. No other file looks up a family,
reads `model.config` or applies `megatron.transformer` to them. Nothing is imported from torch or Megatron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lccp.config.tree import Config, StageConfig
from megatron_lccp.model.families import family_of
from megatron_lccp.model.hf_config import Description, read_config
from megatron_lccp.model.rope import Rope
from megatron_lccp.model.shape import Shape


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a configuration, on any layout."""

    name: str
    """Of its family, or of the architecture that its config.json names."""
    description: Description
    """What it is; `fields` win over its own."""
    fields: Mapping[str, Any]
    """Fields of TransformerConfig that make it, `megatron.transformer` applied."""
    precision: str
    """training.precision; `auto` only for what is planned for another machine."""
    vocab_multiple: int
    """The vocabulary is padded to a multiple of this."""
    vocab_size: int | None = None
    """Tokens; None before the tokenizer is known, if the family leaves them to it."""
    hf_config: str | None = None
    """The text of its config.json, for the way back; None of a family."""

    @cached_property
    def shape(self) -> Shape:
        """What its layers consist of; ask once its fields are checked."""
        return self.description.shape_with(self.fields)

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
        return dataclasses.replace(self, vocab_size=self.description.vocab_size or size)

    def rope(self, stage: StageConfig) -> Rope:
        """Its rotary embedding in a stage."""
        return self.description.rope.of_stage(stage)


def resolve(config: Config) -> ResolvedModel:
    """The model of a configuration, which may still be wrong.

    ValueError if there is no such family, or for a config.json that cannot be read or that Megatron-Core cannot build.
    """
    text = None
    if config.model.config is None:
        name, found = config.model.family, family_of(config.model.family)
    else:
        try:
            found, text = read_config(Path(config.model.config))
        except ValueError as error:
            raise ValueError(f"model.config: {error}") from error
        name = found.architecture
    return ResolvedModel(
        name=name,
        description=found,
        fields=found.fields(config.megatron.transformer),
        precision=config.training.precision,
        vocab_multiple=config.model.vocab_multiple,
        vocab_size=found.vocab_size,
        hf_config=text,
    )
