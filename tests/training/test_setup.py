"""What is looked at before anything starts: a tokenizer and weights that belong to one model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_lccp.config.tree import Config, ModelConfig
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.model.resolved import resolve
from megatron_lccp.training.setup import check_base
from megatron_lccp.weights.streams import whole_header

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def tokenizer_of(ids: int) -> Tokenizer:
    return Tokenizer(Path("own/tokenizer.json"), "sha", ids, 0)


def test_a_tokenizer_with_more_ids_than_weights_have_rows_is_refused(tmp_path: Path) -> None:
    """Of weights that were converted, whatever the configuration calls the model; with fewer ids all rows count."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=whole_header({"hf_config": json.dumps(LLAMA)}))
    model = resolve(Config(model=ModelConfig(config=str(tmp_path))))
    assert model.of_vocabulary(200).vocabulary == 300
    for ids in (200, 300):
        assert "hf_config" in check_base(model.of_vocabulary(ids), str(path), tokenizer_of(ids))
    said = f"own/tokenizer.json has 320 token ids, {path} has weights for 300; give the tokenizer that belongs to it"
    with pytest.raises(ValueError) as caught:
        check_base(model.of_vocabulary(320), str(path), tokenizer_of(320))
    assert str(caught.value) == said
    other = dataclasses.replace(model, vocab_size=200)  # as a family would have it that leaves it to the tokenizer
    with pytest.raises(ValueError, match="has 300 tokens, data.tokenizer.path 200, .*; set model.config"):
        check_base(other, str(path), tokenizer_of(200))
