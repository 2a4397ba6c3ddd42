"""The Hugging Face engine against transformers' eager attention matrices and whole logits, in FP32; and the two engines
against each other.

Models are random and of a few layers. The engine deals shared prefills over two ranks, in which cells lie together;
transformers runs every sample, and every null question, alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.measuring.test_prefills import lay_out

pytest.importorskip("transformers")

VOCAB = 97
IDS = 9
"""Tokens in use, so few that heads often find the one they look for."""
WINDOW = 20
"""Of sliding windows and chunks; samples have up to 90 tokens."""
CELLS = [(0, 0), (0, 9), (5, 20), (5, 7), (17, 3), (17, 20), (30, 11), (5, 20)]

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=12,
    intermediate_size=64, initializer_range=0.25, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
    eos_token_id=1,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=10, head_dim=8,
    num_key_value_heads=6, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=2, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
LINEAR = dict(
    num_hidden_layers=4, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, shared_expert_intermediate_size=32, **EXPERTS,
)  # fmt: skip
ROPE = dict(rope_theta=10000.0, original_max_position_embeddings=40)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, {**SMALL, **more})
    for name, (kind, more) in {
        "Llama": ("Llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
        "Qwen3": ("Qwen3", {}),
        "Qwen3-MoE": ("Qwen3Moe", EXPERTS),
        "OLMo 2": ("Olmo2", {}),
        "Mistral with a window": ("Mistral", dict(sliding_window=WINDOW)),
        "Gemma 2": ("Gemma2", dict(
            sliding_window=WINDOW, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            layer_types=MIXED)),
        "Gemma 3": ("Gemma3Text", dict(sliding_window=WINDOW, layer_types=MIXED, query_pre_attn_scalar=5)),
        "Cohere 2": ("Cohere2", dict(sliding_window=WINDOW, layer_types=MIXED, logit_scale=0.3)),
        "gpt-oss": ("GptOss", dict(sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
            layer_types=MIXED, rope_parameters=dict(ROPE, rope_type="default"))),
        "DeepSeek-V3": ("DeepseekV3", LATENT),
        "GPT-NeoX": ("GPTNeoX", dict(rotary_pct=0.25)),
        "Phi-3": ("Phi3", {}),
        "HunYuan V1 MoE": ("HunYuanMoEV1", dict(num_experts=4, moe_topk=2)),
        "Granite": ("Granite", dict(attention_multiplier=0.5, logits_scaling=4.0)),
        "Llama 4 in chunks": ("Llama4Text", dict(attention_chunk_size=WINDOW, num_local_experts=4, intermediate_size_mlp=64,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"])),
        "GPT-2": ("GPT2", {}),
        "Qwen3-Next": ("Qwen3Next", LINEAR),
        "Phi-3, LongRoPE": ("Phi3", dict(head_dim=8, rope_parameters=dict(ROPE, rope_type="longrope", short_factor=[1.0] * 4,
            long_factor=[3.0] * 4), original_max_position_embeddings=40)),
        "Llama, dynamic RoPE": ("Llama", dict(
            max_position_embeddings=40, rope_parameters=dict(ROPE, rope_type="dynamic", factor=4.0))),
        "Bloom": ("Bloom", {}),
    }.items()
}  # fmt: skip
ALONE = {"Qwen3-Next": [3], "Phi-3, LongRoPE": [0, 1, 2], "Llama, dynamic RoPE": [0, 1, 2], "Bloom": []}
"""Models whose cells do not share prefills, and their layers with attention that is seen."""
NOT_SEEN = ("Bloom",)
TWINS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    f"{heads} heads over {groups} of {width}{', tied' * tied}": (
        {**SMALL, **dict(hidden_size=36, num_attention_heads=heads, num_key_value_heads=groups, head_dim=width, rms_norm_eps=1e-5,
                         tie_word_embeddings=tied)},
        [(0, 1), (1, heads - 1), (2, 0)],
    )
    for heads, groups, width, tied in ((6, 6, 10, True), (9, 1, 14, False), (9, 3, 22, False), (4, 2, 6, True))
}  # fmt: skip


def made_samples() -> list:
    samples = []
    for fact, (needle, question, null) in enumerate([(7, 4, 5), (12, 3, 1)]):
        rng = np.random.default_rng(fact)
        parts = [rng.integers(2, 2 + IDS, size) for size in (60, needle, question, null)]
        samples += [lay_out(b, a, *parts, family="f", index=fact) for b, a in CELLS[3 * fact :]]
    return samples


SAMPLES = made_samples()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ranks found, which is the same on both; "eager" is from whichever rank computed it."""
    one, two = run_ranks(
        2, "hf_jobs.measure", models=MODELS, samples=SAMPLES, twins=TWINS, where=tmp_path_factory.mktemp("hf")
    )
    for name in MODELS:
        one[name].setdefault("eager", two[name].get("eager"))
        for k, found in one[name]["said"].items():
            assert np.array_equal(found.nll_r, two[name]["said"][k].nll_r)
    return one


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_SEEN])
def test_measured_equals_eager(measured: dict[str, Any], name: str) -> None:
    said, eager, layers = measured[name]["said"], measured[name]["eager"], ALONE.get(name, [0, 1, 2])
    assert said.keys() == set(range(len(SAMPLES)))
    found_once = 0
    for k, (sample, expected) in enumerate(zip(SAMPLES, eager)):
        found, look = said[k], said[k].look
        np.testing.assert_allclose(found.nll_r, expected["nll_r"], atol=1e-5, rtol=1e-5)
        assert found.best_r.tolist() == expected["best_r"].tolist()
        np.testing.assert_allclose(look.answer_mass_LN[layers], expected["answer_mass_LN"], atol=1e-5)
        np.testing.assert_allclose(look.question_mass_LN[layers], expected["question_mass_LN"], atol=1e-5)
        np.testing.assert_allclose(found.null_mass_LN[layers], expected["null_mass_LN"], atol=1e-5)
        weight_LNrt, position_LNr = expected["answer_LNrt"], look.position_LNr[layers]
        there = np.take_along_axis(weight_LNrt, position_LNr[..., None], -1)[..., 0]
        np.testing.assert_allclose(there, weight_LNrt.max(-1), atol=1e-6)  # another one only on a tie
        entropy_LNr = found.measured_LNr["attention_entropy"][layers]
        np.testing.assert_allclose(entropy_LNr, expected["entropy_LNr"], atol=3e-5)
        found_once += (position_LNr >= sample.needle[0]).mean() > 0.1
    assert found_once > 3  # it says something


def test_cells_share_prefills_where_they_can(measured: dict[str, Any]) -> None:
    alone = sum(len(s.tokens) + s.question[0] + len(s.null_question) for s in SAMPLES)
    for name in MODELS:
        tokens = measured[name]["tokens"]
        assert tokens == alone if name in ALONE else tokens < 0.7 * alone, name


def test_what_cannot_be_followed_is_said(measured: dict[str, Any]) -> None:
    assert {name: measured[name]["notes"] for name in MODELS if measured[name]["notes"]} == {
        "Qwen3-Next": [
            "3 of 4 layers have no attention: 0-2",
            "prefills are not shared: some of its layers have no attention, and may carry a state from token to token",
        ],
        **{
            name: ["prefills are not shared: the rotation of its positions depends on the longest of them"]
            for name in ("Phi-3, LongRoPE", "Llama, dynamic RoPE")
        },
        "Bloom": [
            "heads cannot be scored, and prefills are not shared: none of its layers calls transformers' attention interface"
        ],
    }


def test_layers_without_attention_have_no_scores(measured: dict[str, Any]) -> None:
    for found in measured["Qwen3-Next"]["said"].values():
        assert np.isnan(found.look.answer_mass_LN[:3]).all() and np.isnan(found.null_mass_LN[:3]).all()
        assert (found.look.position_LNr[:3] == -1).all()
        assert np.isnan(found.measured_LNr["needle_output"][:3]).all()


@pytest.mark.parametrize("way", ["whole", "without"])
@pytest.mark.parametrize("name", TWINS)
def test_both_engines_are_equal(measured: dict[str, Any], name: str, way: str) -> None:
    hf, megatron = (measured["twins"][name][engine] for engine in ("hf", "megatron"))
    assert hf["sizes"] == megatron["sizes"] == (3, TWINS[name][0]["num_attention_heads"])
    for k, found in megatron[way].items():
        other = hf[way][k]
        np.testing.assert_allclose(other.nll_r, found.nll_r, atol=1e-5, rtol=1e-5)
        assert other.best_r.tolist() == found.best_r.tolist()
        assert (other.look.position_LNr == found.look.position_LNr).mean() > 0.99  # up to ties
        for of in ("answer_mass_LN", "question_mass_LN"):
            np.testing.assert_allclose(getattr(other.look, of), getattr(found.look, of), atol=1e-5)
        np.testing.assert_allclose(other.null_mass_LN, found.null_mass_LN, atol=1e-5)
        np.testing.assert_allclose(
            other.measured_LNr["needle_output"], found.measured_LNr["needle_output"], atol=2e-5, rtol=1e-4
        )
    if way == "without":
        changes = [abs(hf["whole"][k].nll_r - found.nll_r).max() for k, found in hf["without"].items()]
        assert min(changes) > 1e-3


def by_place(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Value by metric and coordinates; without times, and what differs from run to run."""
    kept = [row for row in rows if row["metric"] != "window_time"]
    found = {repr({name: x for name, x in row.items() if name != "value"}): row["value"] for row in kept}
    assert len(found) == len(kept) > 100
    return found


def test_every_monitor_gives_the_same_rows_on_both_engines(measured: dict[str, Any]) -> None:
    hf, megatron = measured["windows"]["Llama"], measured["windows"]["megatron"]
    assert hf["events"] == megatron["events"]
    ours, theirs = by_place(hf["rows"]), by_place(megatron["rows"])
    assert ours.keys() == theirs.keys() and len({row["monitor"] for row in hf["rows"]}) == 6
    np.testing.assert_allclose(list(ours.values()), [theirs[place] for place in ours], atol=1e-4, rtol=1e-4)


def test_a_model_is_left_as_it_was(measured: dict[str, Any]) -> None:
    assert all(found["left_as_it_was"] for found in measured["windows"].values())


def test_monitors_on_a_model_with_attention_on_one_layer(measured: dict[str, Any]) -> None:
    rows, events = (measured["windows"]["Qwen3-Next"][what] for what in ("rows", "events"))
    assert {row["layer"] for row in rows if row["metric"] in ("retrieval_score", "needle_mass")} == {3}
    assert ("no_rows", "RetrievalHeads.needle_mass: no attention to score in layers 0-2") in events
    assert [text for kind, text in events if kind == "monitor_error"] == [
        "HeadAblation: ValueError: heads: layer 0 has no attention head 1"
    ]
    assert not [row for row in rows if np.isnan(row["value"])]


def test_monitors_on_a_model_that_cannot_be_followed(measured: dict[str, Any]) -> None:
    rows, events = (measured["windows"]["Bloom"][what] for what in ("rows", "events"))
    assert {row["monitor"] for row in rows} == {"CorpusPPL", "NeedleGrid", "CopyBack"}
    why = "ValueError: heads cannot be scored: none of its layers calls transformers' attention interface"
    assert events == [
        ("monitor_error", f"{name}: {why}") for name in ("InterferenceGrid", "RetrievalHeads", "HeadAblation")
    ]


def test_two_ranks_that_share_a_model_say_what_one_says(measured: dict[str, Any]) -> None:
    spread = measured["spread"]
    assert (spread["query rows 1"], spread["query rows 2"]) == (72, 36)
    assert spread["sizes 2"] == spread["sizes 1"] and not spread["notes 2"] + spread["notes 1"]
    for k, alone in spread[1].items():
        found = spread[2][k]
        np.testing.assert_allclose(found.nll_r, alone.nll_r, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(found.look.answer_mass_LN, alone.look.answer_mass_LN, atol=1e-5)
        assert (found.look.position_LNr == alone.look.position_LNr).mean() > 0.99  # up to ties
        for name, value_LNr in alone.measured_LNr.items():
            np.testing.assert_allclose(found.measured_LNr[name], value_LNr, atol=1e-4)


def test_what_is_not_read_is_said_in_one_line(measured: dict[str, Any]) -> None:
    said = measured["refused"]
    assert said["too long"] == "a sample has 65 tokens, the model has learned positions for 64"
    assert {name: text for name, text in said.items() if name in ("whole", "left over")} == {
        "whole": "",
        "left over": "",
    }
    remedy = "; take the config.json that belongs to these weights"
    assert said["lacks"] == (
        "W/lacks: lacks tensors of the model that config.json describes, which would be random: "
        "model.layers.1.input_layernorm.weight" + remedy
    )
    assert said["beyond"] == (
        "W/beyond: has tensors that the model that config.json describes does not have: model.layers.9.extra.weight"
        + remedy
    )
    for name, begins in {
        "shape": "W/shape: ", "torn": "W/torn: ",
        "pickle": "W/pickle/pytorch_model.bin: is a pickle, which can run code when it is read; save the model as",
        "code": "W/code: config.json (auto_map): the model comes with code of its own, which is not run; take one",
        "unknown": "W/unknown: config.json (model_type): the installed transformers has no such model; install a newer",
        "adapter": "W/adapter/adapter_config.json: is an adapter; merge it into its model and save that",
        "empty": "W/empty/config.json: is not there; name a folder that transformers",
        "nowhere": "W/nowhere: is no folder; name one that holds config.json and *.safetensors",
        "whole/model.safetensors": "W/whole/model.safetensors: is a file; name the folder that holds config.json",
    }.items():  # fmt: skip
        assert said[name].startswith(begins) and "\n" not in said[name], said[name]
