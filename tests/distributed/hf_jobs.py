"""What ranks do for tests/measuring/test_hf_engine.py: random models of transformers, measured and computed eagerly."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.measuring.engine import Asked
from megatron_lccp.measuring.head_scores import chosen_scores
from megatron_lccp.measuring.prefills import deal, one_each, plain, shared
from megatron_lccp.parallel.groups import make_groups, start_ranks


def random_model(kind: str, fields: Mapping[str, Any]) -> Any:
    """A causal model of transformers, of the class of configurations that is named, the same on every rank."""
    import transformers

    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("sinks"):
                parameter.normal_(0, 2)
    return model


@torch.no_grad()
def eagerly(model: Any, sample: Any) -> dict[str, Any]:
    """What transformers says of one sample and of its null question, each alone, from matrices and whole logits.

    Of layers that attend: nll_r, best_r, attention of the answer's rows [L, N, r, t], masses [L, N].
    """
    model.set_attn_implementation("eager")

    def forward(tokens: np.ndarray) -> Any:
        model(torch.as_tensor(tokens[:1])[None], use_cache=False)  # takes a rotation back that the last text changed
        out = model(torch.as_tensor(tokens)[None], output_attentions=True, use_cache=False)
        return out.logits[0].double(), torch.stack([x for x in out.attentions if x is not None])[:, 0].double()

    logit_sv, weight_LNst = forward(sample.tokens)
    start, end = sample.answer
    asked, needle = sample.question[0], slice(*sample.needle)
    rows, answer = logit_sv[start - 1 : end - 1], torch.as_tensor(sample.tokens[start:end])
    null_LNst = forward(np.concatenate([sample.tokens[:asked], sample.null_question]))[1]
    on_needle = weight_LNst[..., needle].sum(-1)
    answer_LNrt = weight_LNst[:, :, start - 1 : end - 1]
    return {
        "nll_r": torch.nn.functional.cross_entropy(rows, answer, reduction="none").numpy(),
        "best_r": rows.argmax(-1).numpy(),
        "answer_LNrt": answer_LNrt.float().numpy(),
        "answer_mass_LN": on_needle[:, :, start - 1 : end - 1].mean(-1).numpy(),
        "question_mass_LN": on_needle[:, :, asked:start].mean(-1).numpy(),
        "null_mass_LN": null_LNst[:, :, asked:, needle].sum((-1)).mean(-1).numpy(),
        "entropy_LNr": torch.special.entr(answer_LNrt).sum(-1).numpy(),
    }


def measure(models: Mapping[str, tuple[str, Mapping[str, Any]]], samples: Sequence[Any], twins: Mapping, where: Path):
    """Two ranks: by model, what the engine says of the samples on two replicas, and on each rank half of what
    transformers says; models on both engines; a model over two ranks; and what is said of folders."""
    from megatron_lccp.measuring import engine as engine_module
    from megatron_lccp.measuring import hf_attention, hf_engine
    from megatron_lccp.measuring.hf_engine import HFEngine
    from tests.measuring.own_scores import OWN

    engine_module.PREFILLS_AT_ONCE = 2  # keys and values are kept from one round to the next
    hf_engine.ROWS_AT_ONCE, hf_attention.QUERY_BLOCK, hf_attention.KEY_BLOCK = 5, 16, 8
    device = start_ranks(timeout_s=300)
    torch.set_num_threads(1)
    groups, own = make_groups(ParallelConfig(), device, 3), chosen_scores(OWN)
    found: dict[str, Any] = {}
    for number, (name, (kind, fields)) in enumerate(models.items()):
        model = random_model(kind, fields)
        engine = HFEngine(model, groups)
        share = engine.why_not_shared() is None
        trees = shared(samples, True, 2, 48) if share else one_each(samples, True)
        looks = engine.why_not_followed is None
        with engine.opened():
            said = engine.predict(deal(trees, 2), Asked(looks, looks, own if looks else ()))
        found[name] = dict(said=said, notes=engine.notes, sizes=engine.sizes, tokens=sum(map(len, sum(trees, []))))
        if looks and number % 2 == dist.get_rank():
            found[name]["eager"] = [eagerly(model, sample) for sample in samples]
    found["twins"] = {name: _twins(groups, samples, *twin) for name, twin in twins.items()}
    found["windows"] = _windows(groups, where, {name: models[name] for name in ("Llama", "Qwen3-Next", "Bloom")})
    found["refused"] = _refused(groups, where, models["Llama"][1])
    found["spread"] = _spread(where, samples, models["Llama"][1])
    return found


def _twins(groups: Any, samples: Sequence[Any], fields: Mapping[str, Any], heads: Sequence[tuple[int, int]]) -> dict:
    """What both engines say of one Llama: whole, and without some heads."""
    from megatron_lccp.measuring.hf_engine import HFEngine
    from megatron_lccp.measuring.megatron_engine import MegatronEngine
    from tests.distributed.parity_jobs import _llama

    model = random_model("Llama", fields)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    chunk = _llama(fields, state, fields["head_dim"] ** -0.5, groups)
    found = {}
    for name, engine in {
        "hf": HFEngine(model, groups), "megatron": MegatronEngine([chunk], groups, fields["vocab_size"])
    }.items():  # fmt: skip
        asked, dealt = (
            Asked(True, True, chosen_scores(["tests.measuring.own_scores.NeedleOutput"])),
            deal(shared(samples, True, 2), 2),
        )
        with engine.opened():
            found[name] = {"whole": engine.predict(dealt, asked, lambda tokens: None, None)}
            with engine.without_heads(heads):
                found[name]["without"] = engine.predict(dealt, asked, lambda tokens: None, None)
        found[name]["sizes"] = engine.sizes[:2]
    return found


def _windows(groups: Any, where: Path, models: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Rows and events of every monitor: of a Llama on both engines, and of other models of transformers."""
    from megatron_lccp.config.load import load_monitors
    from megatron_lccp.data.haystacks import bundled_tokens
    from megatron_lccp.data.tokenizers.load import load_tokenizer
    from megatron_lccp.measuring import EvalWindow
    from megatron_lccp.measuring.hf_engine import HFEngine
    from megatron_lccp.measuring.megatron_engine import MegatronEngine
    from tests.distributed.parity_jobs import _llama
    from tests.suite import small_suite

    tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
    path = where / f"monitors-{dist.get_rank()}.yaml"
    path.write_text(small_suite().replace("--monitors=", "monitors: "))
    monitors, texts = load_monitors(path), {"code": "bundled/stdlib", "people": "bundled/biographies"}
    found: dict[str, Any] = {}
    for name, (kind, fields) in models.items():
        fields = {**fields, "vocab_size": tokenizer.vocab_size}
        model = random_model(kind, fields)
        engines: dict[str, Any] = {name: HFEngine(model, groups)}
        if kind == "Llama":
            state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
            chunk = _llama(fields, state, fields["head_dim"] ** -0.5, groups)
            engines["megatron"] = MegatronEngine([chunk], groups, tokenizer.vocab_size)
        for which, engine in engines.items():
            model.train()
            before, events = torch.get_rng_state(), []
            window = EvalWindow(
                engine=engine, run="r", tokenizer=tokenizer, config_hash="", stage="", step=0, tokens=0,
                text=lambda name, at_least: bundled_tokens(texts[name], tokenizer, at_least), corpora=tuple(texts),
            )  # fmt: skip
            with window.opened():
                rows = window.measure(monitors, lambda kind, text: events.append((kind, text)))
            same = model.training and torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()
            found[which] = dict(rows=[dataclasses.asdict(row) for row in rows], events=events, left_as_it_was=same)
    return found


def _spread(where: Path, samples: Sequence[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a Llama says that two ranks share, and what one says alone; whole, and without some heads."""
    from megatron_lccp.measuring.hf_engine import HFEngine
    from tests.measuring.own_scores import OWN

    folder, asked, found = where / "llama", Asked(True, True, chosen_scores(OWN)), {}
    if dist.get_rank() == 0:
        random_model("Llama", fields).save_pretrained(folder)
    dist.barrier()
    for tp in (1, 2):
        engine = HFEngine.load(folder, tp=tp)
        dealt = deal(shared(samples, True, 1, 48), engine.groups.dp.size())
        with engine.opened(), engine.without_heads([(0, 1), (1, 5)]):
            found[tp] = engine.predict(dealt, asked)
        found[f"sizes {tp}"], found[f"notes {tp}"] = engine.sizes, engine.notes
        weight = engine.model.model.layers[0].self_attn.q_proj.weight
        found[f"query rows {tp}"] = len(weight.to_local() if hasattr(weight, "to_local") else weight)
    return found


def _refused(groups: Any, where: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """What is said of folders in which something is wrong; "" for one that is loaded. On one rank as on both."""
    from safetensors.torch import load_file, save_file

    from megatron_lccp.measuring.hf_engine import HFEngine

    whole, names = (
        where / "whole",
        ["left over", "lacks", "beyond", "shape", "pickle", "code", "unknown", "adapter", "torn"],
    )
    if dist.get_rank() == 0:
        random_model("Llama", fields).save_pretrained(whole)
        for name in names:
            shutil.copytree(whole, where / name)
        state = load_file(whole / "model.safetensors")
        norm = "model.layers.1.input_layernorm.weight"
        for name, tensors in {
            "left over": state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)},
            "lacks": {name: x for name, x in state.items() if name != norm},
            "beyond": state | {"model.layers.9.extra.weight": torch.zeros(2)},
            "shape": state | {norm: torch.zeros(7)},
        }.items():
            save_file(tensors, where / name / "model.safetensors", metadata={"format": "pt"})
        (where / "pickle" / "model.safetensors").unlink()
        torch.save(state, where / "pickle" / "pytorch_model.bin")
        config = json.loads((whole / "config.json").read_text())
        for name, more in {
            "code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
            "unknown": {"model_type": "mine"},
        }.items():
            (where / name / "config.json").write_text(json.dumps(config | more))
        (where / "adapter" / "adapter_config.json").write_text("{}")
        (where / "torn" / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:999])
        (where / "empty").mkdir()
    dist.barrier()
    engine, found = HFEngine(random_model("GPT2", fields | {"max_position_embeddings": 64}), groups), {}
    try:
        with engine.opened():
            engine.predict([[plain(np.zeros(65, np.int64), rank, (1, 65))] for rank in range(2)], Asked())
    except ValueError as error:
        found["too long"] = str(error)
    for name in ("whole", *names, "empty", "nowhere", "whole/model.safetensors"):
        try:
            HFEngine.load(where / name)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error).replace(str(where), "W")
    return found
