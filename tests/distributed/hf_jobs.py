"""What ranks do for tests/measuring/test_hf_engine.py: random models of transformers, measured and computed eagerly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.measuring.engine import Asked
from megatron_lccp.measuring.head_scores import chosen_scores
from megatron_lccp.measuring.prefills import deal, one_each, shared
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
    from megatron_lccp.measuring.hf_engine import HFEngine
    from tests.measuring.own_scores import OWN

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
