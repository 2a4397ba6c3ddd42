"""What monitors measure against the same thing computed the naive way: full attention matrices, full logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.distributed.ranks import run_ranks
from tests.measuring.own_scores import OWN
from tests.tiny import MONITORS


@pytest.fixture(scope="module")
def inside(tiny_yaml: Path) -> dict:
    """All monitors, samples with a begin token; of the second grid only the coordinates are its own."""
    corpus, grid, heads = yaml.safe_load(tiny_yaml.read_text())["monitors"]
    heads["init_args"]["scores"] = ["retrieval_score", "needle_mass", *OWN]
    corpus["init_args"]["edges_tok"] = [40, 64, 16, 1, 16]
    text = {"haystacks": ["code"], "samples": 2}
    between = {
        "class_path": f"{MONITORS}.InterferenceGrid",
        "init_args": {**text, "befores_tok": [9, 40], "afters_tok": [25]},
    }
    ablation = {"lengths_tok": [150], "depths": [0.5], "top": [2], "heads": [[1, 2]], **text}
    without = {"class_path": f"{MONITORS}.HeadAblation", "init_args": ablation}
    copies = {"longest_tok": 111, "segment_tok": 9, "samples": 2}
    copy_back = {"class_path": f"{MONITORS}.CopyBack", "init_args": copies}
    monitors = json.dumps([corpus, grid, heads, between, without, copy_back])
    overrides = [f"--monitors={monitors}", "--data.tokenizer.bos=eod"]
    return run_ranks(1, "look_inside", path=tiny_yaml, overrides=overrides)[0]


def rows_of(inside: dict, metric: str, sample: dict) -> list[dict]:
    at = {"sample": sample["sample"], "depth_cell": sample["depth_cell"], "length_tok": len(sample["tokens"])}
    at |= {"before_tok": sample["needle"][0] - 1, "after_tok": sample["question"][0] - sample["needle"][1]}
    at |= {"depth": at["before_tok"] / (at["before_tok"] + at["after_tok"]), "monitor": sample["monitor"]}
    return [row for row in inside["rows"] if row["metric"] == metric and at.items() <= row.items()]


def full_attention(layer: dict) -> np.ndarray:
    """[heads, s, s] causal softmax attention, one head after another."""
    query, key = layer["query"], layer["key"]
    length, heads, width = query.shape
    shared = heads // key.shape[1]
    attention = np.zeros((heads, length, length))
    for head in range(heads):
        score = query[:, head] @ key[:, head // shared].T / np.sqrt(width)
        score[np.triu_indices(length, 1)] = -np.inf
        exp = np.exp(score - score.max(-1, keepdims=True))
        attention[head] = exp / exp.sum(-1, keepdims=True)
    return attention


def test_tapped_query_and_key_are_those_that_attention_uses(inside: dict) -> None:
    for layer in inside["samples"][0]["layers"].values():
        attention, value = full_attention(layer), layer["value"]
        shared = attention.shape[0] // value.shape[1]
        output = np.concatenate([attention[h] @ value[:, h // shared] for h in range(attention.shape[0])], axis=-1)
        np.testing.assert_allclose(output, layer["output"], atol=1e-5)


def test_retrieval_score_and_mass_equal_full_matrices(inside: dict) -> None:
    compared, scores = 0, set()
    for sample in (s for s in inside["samples"] if s["monitor"] == "RetrievalHeads"):
        measured = {
            metric: {(row["layer"], row["head"]): row["value"] for row in rows_of(inside, metric, sample)}
            for metric in ("retrieval_score", "needle_mass")
        }
        tokens, (start, end), (low, high) = sample["tokens"], sample["answer"], sample["needle"]
        for number, layer in sample["layers"].items():
            for head, attention in enumerate(full_attention(layer)):
                hits, masses = 0, []
                for position in range(start, end):
                    row = attention[position - 1]
                    looked_at = int(np.argmax(row))
                    hits += low <= looked_at < high and tokens[looked_at] == tokens[position]
                    masses.append(row[low:high].sum())
                score = measured["retrieval_score"][number, head]
                assert score == pytest.approx(hits / (end - start), abs=1e-6)
                assert measured["needle_mass"][number, head] == pytest.approx(np.mean(masses), abs=1e-5)
                compared, scores = compared + 1, scores | {round(score, 6)}
    assert compared == 6 * 2 * 4 and len(scores) > 1  # 6 samples, 2 layers, 4 heads; not all the same score


def test_scores_of_others_equal_full_matrices(inside: dict) -> None:
    """What needs every weight, and what needs values: from whole attention matrices in float64."""
    compared = 0
    for sample in (s for s in inside["samples"] if s["monitor"] == "RetrievalHeads"):
        rows, needle = slice(sample["answer"][0] - 1, sample["answer"][1] - 1), slice(*sample["needle"])
        measured = {
            metric: {(row["layer"], row["head"]): row["value"] for row in rows_of(inside, metric, sample)}
            for metric in ("attention_entropy", "needle_output")
        }
        for number, layer in sample["layers"].items():
            for head, attention in enumerate(full_attention(layer)):
                value = layer["value"][:, head // 2]  # two query heads share one
                entropy = -(attention[rows] * np.log(attention[rows].clip(1e-300))).sum(-1).mean()
                brought = np.linalg.norm(attention[rows, needle] @ value[needle], axis=-1).mean()
                assert measured["attention_entropy"][number, head] == pytest.approx(entropy, abs=2e-5)
                assert measured["needle_output"][number, head] == pytest.approx(brought, rel=1e-4, abs=1e-6)
                compared += 1
    assert compared == 6 * 2 * 4


def test_answer_nll_and_exact_equal_full_logits(inside: dict) -> None:
    compared = 0
    for sample in (s for s in inside["samples"] if s["monitor"] in ("NeedleGrid", "InterferenceGrid")):
        start, end = sample["answer"]
        nll, best = losses(inside, sample["logits"], sample["tokens"], range(start, end))
        exact = best == sample["tokens"][start:end].tolist()
        (measured,), (hit,) = rows_of(inside, "answer_nll", sample), rows_of(inside, "exact", sample)
        assert measured["value"] == pytest.approx(np.mean(nll), abs=1e-5) and measured["n"] == end - start
        assert bool(hit["value"]) == exact
        content = sample["content"]
        (measured,), (hit,) = rows_of(inside, "content_nll", sample), rows_of(inside, "content_exact", sample)
        assert measured["value"] == pytest.approx(np.array(nll)[content].mean(), abs=1e-5)
        right = np.array(best) == sample["tokens"][start:end]
        assert bool(hit["value"]) == right[content].all() and measured["n"] == hit["n"] == content.sum() < end - start
        compared += 1
    assert compared == 2 * 3 * 2 + 2 * 2  # lengths, depths, samples; befores, samples


def losses(inside: dict, logits: np.ndarray, tokens: np.ndarray, positions: range) -> tuple[list[float], list[int]]:
    """(negative log-likelihood, most likely token) of the tokens at some positions, row by row."""
    nll, best = [], []
    for position in positions:
        row = logits[position - 1, : inside["vocab_size"]]  # padding of the vocabulary is no token
        nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[position]])
        best.append(int(row.argmax()))
    return nll, best


def test_corpus_losses_equal_full_logits(inside: dict) -> None:
    """Whole, by position and by sequence; the first token of a sequence is predicted by nothing."""
    for corpus, sequences in inside["texts"].items():
        found = [row for row in inside["rows"] if row["monitor"] == "CorpusPPL" and row["corpus"] == corpus]
        nll = np.array([losses(inside, logits, tokens, range(1, 64))[0] for tokens, logits in sequences])
        assert nll.shape == (3, 63)
        expected = {("nll", None, None): nll, ("ppl", None, None): nll}
        expected |= {("sequence_nll", None, k): nll[k] for k in range(3)}
        for start, end in ((0, 16), (16, 40), (40, 64)):
            inside_stretch = [position - 1 for position in range(1, 64) if start <= position < end]
            expected["position_nll", (start, end), None] = nll[:, inside_stretch]
            expected |= {("sequence_position_nll", (start, end), k): nll[k, inside_stretch] for k in range(3)}
        assert len(found) == len(expected)
        for row in found:
            assert (row["sample"] is None) == (row["sample_set"] is None)
            stretch = None if row["from_tok"] is None else (row["from_tok"], row["to_tok"])
            part = expected.pop((row["metric"], stretch, row["sample"]))
            value = np.exp(part.mean()) if row["metric"] == "ppl" else part.mean()
            assert row["value"] == pytest.approx(value, rel=1e-5) and row["n"] == part.size


def test_copies_equal_full_logits(inside: dict) -> None:
    """A forward of text and copy for every lag; and lags, as Row has no such coordinate, are the metric's own."""
    found = [row for row in inside["rows"] if row["monitor"] == "CopyBack" and row["metric"] != "window_time"]
    assert len(found) == 2 * (1 + 2 * 2) and len(inside["copies"]) == 2 * 2  # samples, lags, metrics
    for sample, lag, tokens, logits in inside["copies"]:
        assert list(tokens[-9:]) == list(tokens[1:10]) and len(tokens) == 1 + lag + 9 and lag in (64, 101)
        assert len(set(tokens[: lag + 1])) == lag + 1 and min(tokens[1:]) >= 259  # no id comes twice in the text
        first, _ = losses(inside, logits, tokens, range(2, 10))
        second, best = losses(inside, logits, tokens, range(lag + 2, lag + 10))
        mine = [row for row in found if row["sample"] == sample and row["own"] in ({}, {"lag_tok": lag})]
        measured = {row["metric"]: row["value"] for row in mine}
        assert measured == pytest.approx(
            {"first_nll": np.mean(first), "second_nll": np.mean(second), "copied": np.mean(best == tokens[2:10])},
            abs=1e-5,
        )
        assert {(row["metric"], row["n"], row["unit"], row["length_tok"]) for row in mine} == {
            ("first_nll", 8, "nat", None), ("second_nll", 8, "nat", lag + 10), ("copied", 8, "share", lag + 10),
        }  # fmt: skip


def test_ablation_equals_zeroed_columns_and_takes_the_best_heads(inside: dict) -> None:
    samples = [s for s in inside["samples"] if s["monitor"] == "HeadAblation"]
    scores = np.mean([retrieval(sample) for sample in samples], axis=0)
    best = sorted(np.ndindex(scores.shape), key=lambda at: (-scores[at], at))
    assert scores[best[1]] > scores[best[-1]]
    ablated = inside["ablated"]
    assert sorted(ablated["top2"]) == sorted(best[:2]) and ablated["named"] == [(1, 2)]
    assert len(ablated["random2.0"]) == 2 and not set(ablated["random2.0"]) & set(best[:2])
    for sample in samples:
        nll = {
            name: np.mean(losses(inside, logits, sample["tokens"], range(*sample["answer"]))[0])
            for name, logits in {"none": sample["logits"], **sample["without"]}.items()
        }
        measured = {row["ablated"]: row["value"] for row in rows_of(inside, "ablated_nll", sample)}
        assert measured == pytest.approx(nll, abs=2e-5)
        changes = {row["ablated"]: row["value"] for row in rows_of(inside, "nll_change", sample)}
        assert changes == pytest.approx({name: nll[name] - nll["none"] for name in ablated}, abs=2e-5)
        assert max(map(abs, changes.values())) > 1e-3


def retrieval(sample: dict) -> np.ndarray:
    """[layers, heads] by the loop."""
    (start, end), (low, high), tokens = sample["answer"], sample["needle"], sample["tokens"]
    scores = []
    for _, layer in sorted(sample["layers"].items()):
        looked = full_attention(layer)[:, start - 1 : end - 1].argmax(-1)
        scores.append(((low <= looked) & (looked < high) & (tokens[looked] == tokens[start:end])).mean(-1))
    return np.array(scores)


def test_logits_equal_transformers(inside: dict) -> None:
    """The model is Hunyuan's: transformers' eager HunYuanMoEV1 with the same weights gives the same logits."""
    torch = pytest.importorskip("torch")
    hunyuan = pytest.importorskip("transformers.models.hunyuan_v1_moe")
    from tests.distributed.test_layouts import assemble

    w = {name: torch.tensor(tensor) for name, tensor in assemble(inside["weights"]).items()}
    vocab, hidden = w["embedding.word_embeddings.weight"].shape
    config = hunyuan.HunYuanMoEV1Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, moe_intermediate_size=[64] * 2, num_experts=4, moe_topk=[2] * 2,
        num_shared_expert=[1] * 2, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="eager",
        pad_token_id=0,
    )  # fmt: skip
    model = hunyuan.HunYuanMoEV1ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(hunyuan_state(w), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    sample = inside["samples"][0]
    with torch.no_grad():
        logits = model(torch.tensor(sample["tokens"])[None]).logits[0].numpy()
    np.testing.assert_allclose(sample["logits"], logits, atol=1e-4)


def hunyuan_state(w: dict) -> dict:
    """Megatron-Core's tensors under transformers' names: a layer's qkv is [q q k v] a group, fc1 is [gate; up]."""
    state = {
        "model.embed_tokens.weight": w["embedding.word_embeddings.weight"],
        "model.norm.weight": w["decoder.final_layernorm.weight"],
    }
    for layer in range(2):
        to, of = (
            f"model.layers.{layer}.",
            {k.removeprefix("decoder.layers."): v[layer] for k, v in w.items() if "layers." in k},
        )
        qkv = of["self_attention.linear_qkv.weight"].view(2, 4, 16, -1)  # groups, 2 queries + key + value, width
        state[to + "self_attn.q_proj.weight"] = qkv[:, :2].reshape(64, -1)
        state[to + "self_attn.k_proj.weight"] = qkv[:, 2].reshape(32, -1)
        state[to + "self_attn.v_proj.weight"] = qkv[:, 3].reshape(32, -1)
        state[to + "self_attn.o_proj.weight"] = of["self_attention.linear_proj.weight"]
        state[to + "self_attn.query_layernorm.weight"] = of["self_attention.core_attention.q_layernorm.weight"]
        state[to + "self_attn.key_layernorm.weight"] = of["self_attention.core_attention.k_layernorm.weight"]
        state[to + "input_layernorm.weight"] = of["self_attention.linear_qkv.layer_norm_weight"]
        state[to + "post_attention_layernorm.weight"] = of["mlp.linear_fc1.layer_norm_weight"]
        state[to + "mlp.gate.wg.weight"] = of["mlp.router.weight"]
        shared = of["mlp.shared_experts.linear_fc1.weight"]
        state[to + "mlp.shared_mlp.gate_proj.weight"], state[to + "mlp.shared_mlp.up_proj.weight"] = shared.chunk(2)
        state[to + "mlp.shared_mlp.down_proj.weight"] = of["mlp.shared_experts.linear_fc2.weight"]
        gates_ups, downs = of["mlp.experts.experts.linear_fc1.weight"], of["mlp.experts.experts.linear_fc2.weight"]
        state[to + "mlp.experts.gate_up_proj"] = gates_ups
        state[to + "mlp.experts.down_proj"] = downs
    return state
