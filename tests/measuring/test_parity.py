"""What we measure on Megatron-Core models against transformers' eager attention matrices and full logits, in FP32.

The same random weights on both sides: a Hunyuan (our family: QK-norm after RoPE, mixture of experts, tied embeddings,
a padded vocabulary) and a Llama (Megatron-Core's own layers: grouped queries, RMSNorm, dense SwiGLU). transformers runs
every sample, and every null question, as a sequence of its own; we run shared prefills in which the cells lie together.
Setting heads to zero is compared with zeroing their columns of what o_proj is given there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lccp.measuring.head_scores import HEAD_SCORES, head_scores
from tests.distributed.ranks import run_ranks
from tests.measuring.test_prefills import lay_out
from tests.tiny import tiny_tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 97
"""Tokens there are; Hunyuan's matrix has 128 rows."""
IDS = 9
"""Tokens in use, so few that heads often find the one they look for."""
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=12,
    intermediate_size=80, rms_norm_eps=1e-5,
)  # fmt: skip
SCALE = 0.2
"""Softmax scale of the Llama, which is not the root of anything."""
CELLS = [(0, 0), (0, 9), (5, 0), (5, 20), (5, 7), (17, 3), (17, 20), (30, 11), (5, 20)]
ABLATED = [[(0, 1)], [(1, 3), (0, 0)], [(1, 0), (1, 1), (1, 2), (1, 3)]]
MODELS = ("hunyuan", "llama")


def made_samples() -> list:
    samples = []
    for fact, (needle, question, null) in enumerate([(7, 4, 5), (12, 3, 1)]):
        rng = np.random.default_rng(fact)
        parts = [rng.integers(0, IDS, size) for size in (60, needle, question, null)]
        cells = CELLS if fact == 0 else CELLS[3:] + [(41, 2)]
        samples += [lay_out(b, a, *parts, family="f", index=fact) for b, a in cells]
    return samples


SAMPLES = made_samples()


def llama():
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        **LLAMA, initializer_range=0.25, tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    for layer in model.model.layers:
        layer.self_attn.scaling = SCALE
    return model


def hunyuan(weights: dict):
    from transformers.models import hunyuan_v1_moe

    from tests.distributed.test_layouts import assemble
    from tests.distributed.test_measuring import hunyuan_state

    w = {name: torch.tensor(tensor) for name, tensor in assemble(weights).items()}
    config = hunyuan_v1_moe.HunYuanMoEV1Config(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, moe_intermediate_size=[64] * 2, num_experts=4, moe_topk=[2] * 2,
        num_shared_expert=[1] * 2, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model = hunyuan_v1_moe.HunYuanMoEV1ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(hunyuan_state(w), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, by far where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """(what we found, transformers' models)."""
    directory: Path = tmp_path_factory.mktemp("parity")
    (directory / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(directory)))
    theirs = {"llama": llama()}
    state = {name: tensor.numpy() for name, tensor in theirs["llama"].state_dict().items()}
    arguments = dict(path=directory / "tiny.yaml", samples=SAMPLES, vocab_size=VOCAB, ablated=ABLATED)
    (ours,) = run_ranks(
        1, "parity_jobs.measure_models", llama={"fields": LLAMA, "state": state, "scale": SCALE}, **arguments
    )
    theirs["hunyuan"] = hunyuan(ours["weights"])
    return ours, theirs


@torch.no_grad()
def dense(model, tokens, zeroed=()) -> tuple[np.ndarray, np.ndarray]:
    """(logits [s, V], attention [L, N, s, s]) of one sequence, with some heads' outputs set to zero everywhere."""
    width, handles = model.config.head_dim, []
    for number, layer in enumerate(model.model.layers):

        def before(module, args, heads=tuple(head for at, head in zeroed if at == number)):
            (x,) = args
            x = x.clone()
            for head in heads:
                x[..., head * width : (head + 1) * width] = 0
            return (x,)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before))
    out = model(torch.as_tensor(np.asarray(tokens))[None], output_attentions=True)
    for handle in handles:
        handle.remove()
    return out.logits[0, :, :VOCAB].double().numpy(), torch.stack(out.attentions)[:, 0].double().numpy()


@torch.no_grad()
def brought_from(model, tokens, weight_LNrt, span: tuple[int, int]) -> np.ndarray:
    """[L, N, r]: the norm of weight x value summed over the tokens of `span`; values are what v_proj gives."""
    values, handles = [], []
    for layer in model.model.layers:
        hook = layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out[0]))
        handles.append(hook)
    model(torch.as_tensor(np.asarray(tokens))[None])
    for handle in handles:
        handle.remove()
    width, heads = model.config.head_dim, weight_LNrt.shape[1]
    norms = []
    for value_sm, weight_Nrt in zip(values, weight_LNrt):
        value_sgh = value_sm.view(len(value_sm), -1, width)[slice(*span)].double().numpy()
        value_sNh = np.repeat(value_sgh, heads // value_sgh.shape[1], axis=1)
        norms.append(np.linalg.norm(np.einsum("nrt,tnh->nrh", weight_Nrt, value_sNh), axis=-1))
    return np.stack(norms)


def compare(model, sample, found, zeroed=()) -> np.ndarray:
    """Everything that is measured of one sample; returns the retrieval score of every head."""
    logits, attention = dense(model, sample.tokens, zeroed)
    (low, high), (start, end), (asked, _) = sample.needle, sample.answer, sample.question
    nll, best = [], []
    for position in range(start, end):
        row = logits[position - 1]
        nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[sample.tokens[position]])
        best.append(row.argmax())
    np.testing.assert_allclose(found.nll_r, nll, atol=2e-4)
    assert found.best_r.tolist() == best
    layers, heads = attention.shape[:2]
    retrieval = np.zeros((layers, heads))
    for layer in range(layers):
        for head in range(heads):
            hits = 0
            for r, position in enumerate(range(start, end)):
                looked_at = int(attention[layer, head, position - 1].argmax())
                assert found.look.position_LNr[layer, head, r] == looked_at
                hits += low <= looked_at < high and sample.tokens[looked_at] == sample.tokens[position]
            retrieval[layer, head] = hits / (end - start)
    on_needle = attention[..., low:high].sum(-1)
    null_at = [*sample.tokens[:asked], *sample.null_question]
    null = dense(model, null_at, zeroed)[1][:, :, asked:, low:high].sum(-1).mean(-1)
    expected = {
        "retrieval_score": retrieval,
        "needle_mass": on_needle[:, :, start - 1 : end - 1].mean(-1),
        "mass_minus_null": on_needle[:, :, asked:start].mean(-1) - null,
    }
    if not zeroed:
        rows = attention[:, :, start - 1 : end - 1]
        entropy = -(rows * np.log(rows.clip(1e-300))).sum(-1)
        np.testing.assert_allclose(found.measured_LNr["attention_entropy"], entropy, atol=1e-4)
        brought = brought_from(model, sample.tokens, rows[..., low:high], (low, high))
        np.testing.assert_allclose(found.measured_LNr["needle_output"], brought, atol=2e-5)
    scores = head_scores(sample, found, list(HEAD_SCORES))
    for metric, score in expected.items():
        np.testing.assert_allclose(scores[metric], score, atol=3e-5, err_msg=metric)
    common = Counter(sample.tokens[low:high].tolist()) & Counter(best)
    assert ("wu2024" in scores) == (sum(common.values()) / (high - low) > 0.5)
    return retrieval


@pytest.mark.parametrize("way", ["shared", "parts", "small", "rounds", "one_each"])
@pytest.mark.parametrize("name", MODELS)
def test_measured_equals_transformers(measured, name, way):
    ours, theirs = measured
    assert ours[name][way].keys() == set(range(len(SAMPLES)))
    retrieval = [compare(theirs[name], sample, ours[name][way][k]) for k, sample in enumerate(SAMPLES)]
    assert len(np.unique(np.round(retrieval, 6))) > 4 and np.mean(np.array(retrieval) > 0) > 0.1  # it says something


@pytest.mark.parametrize("name", MODELS)
def test_cells_really_share(measured, name):
    """The prefills of this test have shared prefixes, several branches, several taps, and a prefix kept between prefills."""
    shapes = measured[0][name]["shapes"]
    assert any(keeps for *_, keeps in shapes) and len(shapes) < len(SAMPLES)
    assert max(segments for segments, *_ in shapes) > 5 and max(taps for _, taps, _ in shapes) > 4


def test_drawn_prefills_equal_a_forward_for_every_sample(measured):
    """Checked where the model is (parity_jobs.py); here, that it was."""
    assert measured[0]["drawn"] >= 20


def test_a_measurement_goes_on_where_it_was(measured):
    """Only what is missing is run again, and the rest is what was found."""
    (said, first), (again, second), (nothing, third) = measured[0]["kept"]
    assert len(said) > 2 and len(again) == 1 and not nothing
    for found in (second, third):
        for k, one in first.items():
            assert np.array_equal(found[k].nll_r, one.nll_r) and np.array_equal(found[k].best_r, one.best_r)
            assert np.array_equal(found[k].null_mass_LN, one.null_mass_LN)
            for name, array in vars(one.look).items():
                assert np.array_equal(getattr(found[k].look, name), array)
            assert found[k].measured_LNr.keys() == one.measured_LNr.keys() == {"attention_entropy", "needle_output"}
            for name, array in one.measured_LNr.items():
                assert np.array_equal(found[k].measured_LNr[name], array)
    assert first.keys() == second.keys() == third.keys() == set(range(len(SAMPLES)))


@pytest.mark.parametrize("name", MODELS)
def test_an_output_layer_that_does_more_is_asked_itself(measured, name):
    """Logits are not put together from its weight: this one caps them."""
    ours, theirs = measured
    for k, sample in enumerate(SAMPLES[::4]):
        logits, _ = dense(theirs[name], sample.tokens)
        logits = ours[name]["times"] * 2 * np.tanh(logits / 2)
        rows, answer = logits[sample.answer[0] - 1 : sample.answer[1] - 1], sample.tokens[slice(*sample.answer)]
        nll = np.log(np.exp(rows).sum(1)) - rows[np.arange(len(answer)), answer]
        np.testing.assert_allclose(ours[name]["capped"][4 * k].nll_r, nll, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_bf16_logits_are_taken_in_fp32(measured, name):
    """The same as of FP32 logits that were rounded."""
    rounded, bf16 = (measured[0][name][way] for way in ("rounded", "bf16"))
    for k, found in rounded.items():
        assert np.array_equal(found.nll_r, bf16[k].nll_r) and np.array_equal(found.best_r, bf16[k].best_r)
        assert not np.array_equal(found.nll_r, measured[0][name]["one_each"][k].nll_r)


@pytest.mark.parametrize("heads", ABLATED, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_zeroed_heads_equal_zeroed_columns(measured, name, heads):
    """In the text before the answer as in the answer: what later layers see of the haystack changes too."""
    ours, theirs = measured
    found, whole = ours[name][tuple(heads)], ours[name]["shared"]
    for k, sample in enumerate(SAMPLES):
        compare(theirs[name], sample, found[k], heads)
    changes = [abs(found[k].nll_r - whole[k].nll_r).max() for k in range(len(SAMPLES))]
    assert min(changes) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(measured, name):
    for k, found in measured[0][name]["again"].items():
        before = measured[0][name]["shared"][k]
        assert np.array_equal(found.nll_r, before.nll_r)
        assert np.array_equal(found.look.answer_mass_LN, before.look.answer_mass_LN)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_the_answer_alone_are_those_beside_the_question(measured, name):
    """Most measurements ask for no rows of the question; the first row is the one that predicts the first token."""
    for k, found in measured[0][name]["answers"].items():
        beside = measured[0][name]["shared"][k].look
        assert found.look.position_LNr.shape == beside.position_LNr.shape
        assert (found.look.position_LNr == beside.position_LNr).mean() > 0.98  # up to ties
        np.testing.assert_allclose(found.look.answer_mass_LN, beside.answer_mass_LN, atol=1e-5)
        assert found.measured_LNr.keys() == {"attention_entropy", "needle_output"}
        for metric, value_LNr in found.measured_LNr.items():
            np.testing.assert_allclose(value_LNr, measured[0][name]["shared"][k].measured_LNr[metric], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_score_gives_a_number_for_each_row_and_head(measured, name):
    said = measured[0][name]["refused"]
    assert said.startswith("NoRows.of_rows: should be a tensor [12, ") and "(rows, heads), has shape [" in said
