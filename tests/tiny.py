"""A configuration small enough for tests, and its data, prepared once per test session (see conftest.py).

In: a directory. Out: the tree of a YAML file: 2 layers, 64 wide, 4 experts, FP32, all three monitors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SOURCES = "megatron_lccp.data.sources"
MONITORS = "megatron_lccp.monitors"


def tiny_tree(directory: Path) -> dict[str, Any]:
    """The tree; data and runs live under `directory`."""
    grid = {"every": {"steps": 3}, "depths": [0.0, 0.5, 1.0], "samples": 2, "haystacks": ["code"]}
    return {
        "name": "tiny",
        "dir": str(directory / "run"),
        "seed": 7,
        "model": {"family": "tiny_moe", "vocab_multiple": 64},
        "megatron": {
            "transformer": {  # as tiny_moe, smaller
                "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
                "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64,
                "num_moe_experts": 4, "init_method_std": 0.1,
            }
        },
        "training": {"precision": "fp32", "log_every": 1},
        "data": {
            "dir": str(directory / "tokens"),
            "tokenizer": {"path": str(directory / "tokenizer.model"), "train_on": ["code"], "vocab_size": 700},
            "sources": {
                "code": {"class_path": f"{SOURCES}.PythonStdlib", "init_args": {"max_bytes": 400_000}},
                "people": {
                    "class_path": f"{SOURCES}.Biographies", "init_args": {"count": 60, "people_per_document": 3},
                },
            },
            "heldout_share": 0.1,
        },
        "stages": {
            "base": {
                "tokens": 6 * 512, "context_tok": 64, "global_batch_tok": 512, "micro_batch": 2, "lr": 1e-3,
                "warmup_tokens": 1024, "mixture": {"short": {"sources": {"code": 1.0}}},
            },
            "lccp": {
                "tokens": 4 * 512, "context_tok": 128, "rope_base": 50000.0, "global_batch_tok": 512, "lr": 5e-4,
                "mixture": {
                    "short": {"share": 0.25, "sources": {"code": 1.0}},
                    "long": {"share": 0.75, "sources": {"people": 2.0, "code": 1.0}},
                },
            },
        },
        "checkpoint": {"every": {"steps": 3}},
        "monitors": [
            {
                "class_path": f"{MONITORS}.CorpusPPL",
                "init_args": {"every": {"steps": 3}, "length_tok": 64, "sequences": 3},
            },
            {"class_path": f"{MONITORS}.NeedleGrid", "init_args": {**grid, "lengths_tok": [161, 200]}},
            {"class_path": f"{MONITORS}.RetrievalHeads", "init_args": {**grid, "lengths_tok": [180]}},
        ],
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
