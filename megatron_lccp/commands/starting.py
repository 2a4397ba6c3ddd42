"""`lccp init --hf`: a whole training of a published model from its folder and your text, as YAML that runs.

In: a Hugging Face folder, text files, the context to train at, a number of GPUs. Out: the converted weights and a YAML
file; everything that can be wrong is said before either is written. What it chooses stands in the file with its reason:
the layout (planning/suggest.py), the batch, the stage, the rotary embedding, the monitors.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lccp.config.load import ConfigError, parse_config
from megatron_lccp.config.tree import Config
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.load import load_tokenizer
from megatron_lccp.files import write_whole
from megatron_lccp.measuring.beforehand import monitor_problems, planning_window, stand_in_text
from megatron_lccp.model.hf_config import Description, read_config
from megatron_lccp.model.rope import POSITIONS
from megatron_lccp.planning.gpus import GPUS
from megatron_lccp.planning.speed import NODE
from megatron_lccp.planning.suggest import GIB, Suggestion, suggest
from megatron_lccp.text import digits_text, time_text
from megatron_lccp.weights.hf_files import Progress, hf_to_megatron

SOURCES = "megatron_lccp.data.sources"
MONITORS = "megatron_lccp.monitors"
MOST_BATCH_TOK = 4_194_304
"""Tokens of a step, where there is text for a hundred such steps: ProLong's (arXiv 2410.02660)."""
STEPS = 100
"""Steps that a smaller batch aims at."""
VOCAB_MULTIPLE = 128
SAMPLE_BYTES = 1 << 16
"""Of a text, to count how many bytes a token has."""
STRETCH = 4 / 3
"""The rotary base grows with this power of how many times longer the context gets: ProLong took 500 thousand to 8
million for eight times, of which it tried others."""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    folder: Path
    text: tuple[str, ...]
    context_tok: int
    ranks: int
    gpu: str
    out: Path
    tokens: int | None = None
    """Of the stage; None: about as many as the text has."""
    yarn: bool = False
    """Whether to stretch the rotary embedding by YaRN rather than to raise its base."""


def start(asked: Asked, say: Callable[[str], None], progress: Progress) -> None:
    """Convert the weights and write the YAML. Raises ValueError in one line for what is wrong or missing."""
    if asked.out.exists():
        raise ValueError(f"{asked.out}: exists; remove it, or name another with --out")
    description, text = read_config(asked.folder)
    tokenizer = fitting_tokenizer(asked.folder, description)
    sources, text_tok = _sources(asked.text, tokenizer)
    weights = asked.out.parent / "weights" / asked.out.stem
    tree = _tree(asked, description, json.loads(text), sources, text_tok, weights)
    _fit_needles(tree, asked.out, description, tokenizer, say)
    found = suggest(_parsed(tree, asked.out), str(asked.out), asked.ranks, asked.gpu, say)
    if not found:
        room = f"{asked.ranks} {asked.gpu} of {GPUS[asked.gpu].memory_gib:g} GiB"
        raise ValueError(f"--ranks: no layout of {asked.folder} at {asked.context_tok} tokens fits {room}; give more")
    _lay_out(tree, found[0])
    _parsed(tree, asked.out)
    say(f"{asked.folder}: weights go to {weights}")
    hf_to_megatron(asked.folder, weights, VOCAB_MULTIPLE, progress, say=say)
    lines = _head(asked, found[0], text_tok) + as_yaml(tree)
    write_whole(asked.out, lambda path: path.write_text(lines, encoding="utf-8"))


def next_commands(out: Path, ranks: int) -> str:
    """What to run now."""
    lines = [f"{out}: written; now", f"  lccp prepare {out}", f"  lccp plan {out} --ranks {ranks}"]
    here = f"torchrun --nproc-per-node {ranks} --no-python lccp" if ranks > 1 else "lccp"
    several = "  # over several nodes: docs/cluster.md" if ranks > NODE else ""
    return "\n".join([*lines, f"  {here} train {out}{several}"])


def as_yaml(tree: dict[str, Any]) -> str:
    """The tree as YAML without anchors."""
    return yaml.safe_dump(json.loads(json.dumps(tree)), sort_keys=False, width=120)


def fitting_tokenizer(folder: Path, description: Description) -> Tokenizer:
    """The folder's tokenizer; ValueError if there is none, or if it has more ids than the model has rows."""
    tokenizer = load_tokenizer(folder, None, "auto")
    if tokenizer.vocab_size > description.vocabulary:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its weights {description.vocabulary}; it is of "
            "another model"
        )
    return tokenizer


def stdlib_tree(
    folder: Path, weights: Path, vocab_multiple: int, tokenizer: Tokenizer | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """A short training of converted weights on the standard library's code, to be changed: what a conversion prints."""
    description, text = read_config(folder)
    context = min(4096, int(json.loads(text).get(POSITIONS) or 2048))
    asked = Asked(folder, (), context, 1, "H100", Path(f"{folder.resolve().name}.yaml"), tokens=64 * context)
    code = {"class_path": f"{SOURCES}.PythonStdlib", "init_args": {"max_bytes": 4_000_000}}
    tree = _tree(asked, description, json.loads(text), {"code": code}, 1_000_000, weights)
    tree["model"]["vocab_multiple"] = vocab_multiple
    if tokenizer:
        _fit_needles(tree, asked.out, description, tokenizer, say)
    return tree


def _sources(paths: Sequence[str], tokenizer: Tokenizer) -> tuple[dict[str, Any], int]:
    """(data.sources, tokens that they have, about). Files of a folder and an ending are one source."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"--text: {path} is no file; name UTF-8 text, or JSON lines with a field `text`")
        ending = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:])
        groups.setdefault((path.parent, ending), []).append(path)
    sources: dict[str, Any] = {}
    tokens = 0.0
    for (folder, ending), files in groups.items():
        lines = ending.startswith(".json")
        pattern = str(files[0]) if len(files) == 1 else str(folder / f"*{ending}")
        if {Path(name) for name in glob.glob(pattern)} != set(files):
            raise ValueError(
                f"--text: {folder} has other files that end in {ending!r}; put yours in a folder of their own"
            )
        if not lines and len(files) < 2:
            raise ValueError(
                f"--text: {files[0]} is one document; give several files, or JSON lines: some are held out"
            )
        kind, called = ("JsonLines", files[0].name) if lines else ("TextFiles", folder.resolve().name)
        name = "".join(c if c.isalnum() else "_" for c in called.partition(".")[0])
        while name in sources or not name:
            name += "_"
        sources[name] = {"class_path": f"{SOURCES}.{kind}", "init_args": {"glob": pattern}}
        size = sum(file.stat().st_size for file in files) * (3 if ending.endswith(".gz") else 1)
        tokens += size / _bytes_per_token(files[0], tokenizer)
    return sources, round(tokens)


def _bytes_per_token(path: Path, tokenizer: Tokenizer) -> float:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        text = file.read(SAMPLE_BYTES).decode("utf-8", errors="ignore")
    return max(1.0, len(text.encode()) / max(1, len(tokenizer.encode(text))))


def _tree(
    asked: Asked, model: Description, hf: dict[str, Any], sources: dict[str, Any], text_tok: int, weights: Path
) -> dict[str, Any]:
    """The YAML's tree, without a layout."""
    context, name = asked.context_tok, asked.out.stem
    heldout = min(0.2, max(0.01, 8 * context / max(text_tok, 1)))
    budget = asked.tokens or int((1 - heldout) * text_tok)
    unit = context * asked.ranks
    batch = max(unit, min(MOST_BATCH_TOK, budget // STEPS) // unit * unit)
    if budget < batch:
        raise ValueError(
            f"--text: has about {text_tok:,} tokens, too few for a step of {asked.ranks} sequences of {context:,}; give more "
            "text, fewer --ranks or a shorter --context"
        )
    haystack = [next(iter(sources))] if heldout * text_tok > 2 * context else ["bundled/stdlib"]
    lengths = sorted({length for part in (8, 4, 2, 1) if (length := context // part) >= 256}) or [context]
    tenth = max(batch, budget // 10 // batch * batch)
    every = {"every": {"tokens": tenth}}
    corpora = {name: 1.0 for name in sources}
    return {
        "name": name,
        "dir": f"runs/{name}",
        "model": {"config": str(asked.folder), "init_from": str(weights), "vocab_multiple": VOCAB_MULTIPLE},
        "parallel": {},
        "megatron": {"transformer": {}, "ddp": {"overlap_grad_reduce": True} if asked.ranks > 1 else {}},
        "data": {
            "dir": f"data/{name}", "tokenizer": {"path": str(asked.folder), "bos": "auto"},
            "heldout_share": round(heldout, 3), "sources": sources,
        },
        "stages": {
            "long": {
                "tokens": budget // batch * batch, "context_tok": context, **_rope(asked, model, hf),
                "global_batch_tok": batch, "micro_batch": 1, "lr": 1e-5, "min_lr": 1e-6, "lr_schedule": "cosine",
                "warmup_tokens": budget // 10 // batch * batch, "mixture": {"all": {"sources": corpora}},
            }
        },
        "training": {"loss_chunk_tok": 8192} if context > 8192 else {},
        "checkpoint": {"every": {"tokens": tenth}},
        "monitors": [
            {"class_path": f"{MONITORS}.CorpusPPL", "init_args": {**every, "length_tok": context, "sequences": 4}},
            {
                "class_path": f"{MONITORS}.NeedleGrid",
                "init_args": {**every, "lengths_tok": lengths, "samples": 4, "haystacks": haystack},
            },
            {
                "class_path": f"{MONITORS}.RetrievalHeads",
                "init_args": {**every, "lengths_tok": lengths[-1:], "samples": 4, "haystacks": haystack},
            },
        ],
    }  # fmt: skip


def _rope(asked: Asked, model: Description, hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of the stage: the model's own rotary embedding where it reaches so far, else a higher base, or YaRN."""
    own = int(hf.get(POSITIONS) or 0)
    if not own or asked.context_tok <= own:
        return {"rope_base": None}
    if asked.yarn:
        original = model.rope.original_tok or own
        return {"yarn": {"factor": asked.context_tok / original, "original_tok": original}}
    base = model.rope.base * (asked.context_tok / own) ** STRETCH
    digits = 10 ** (math.floor(math.log10(base)) - 1)
    return {"rope_base": float(math.ceil(base / digits) * digits)}


def _fit_needles(
    tree: dict[str, Any], out: Path, model: Description, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Leave out lengths in which a needle, its question and its answer have no room, and monitors that have none left."""
    while len(tree["monitors"]) > 1:
        config = _parsed(tree, out)
        window = planning_window(config, model.shape, model.vocabulary, tokenizer, stand_in_text(config))
        wrong = [number for number, one in enumerate(config.monitors) if monitor_problems([one], window)]
        if not wrong:
            return
        for number in reversed(wrong):
            fields = tree["monitors"][number]["init_args"]
            if len(fields.get("lengths_tok", ())) > 1:
                fields["lengths_tok"] = fields["lengths_tok"][1:]
            else:
                say(
                    f"{config.monitors[number].name} is left out: {monitor_problems([config.monitors[number]], window)[0]}"
                )
                del tree["monitors"][number]


def _lay_out(tree: dict[str, Any], best: Suggestion) -> None:
    parallel = dataclasses.asdict(best.config.parallel)
    tree["parallel"] = {field: size for field, size in parallel.items() if size not in (None, 1)}
    if best.config.parallel.tensor > 1 and best.config.parallel.expert_tensor == 1:
        tree["parallel"]["expert_tensor"] = 1
    tree["megatron"]["transformer"] = dict(best.config.megatron.transformer)


def _parsed(tree: dict[str, Any], out: Path) -> Config:
    """The configuration of a tree. ConfigError, which names the file to be, if it is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / out.name
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            return parse_config(path)
        except ConfigError as error:
            raise ValueError(str(error).replace(str(path), str(out)).splitlines()[0]) from error


def _head(asked: Asked, best: Suggestion, text_tok: int) -> str:
    """What the file says of itself."""
    step = best.stages["long"].total_s
    what = "YaRN" if asked.yarn else "a higher base"
    return "".join(
        f"# {line}\n"
        for line in (
            f"{asked.folder} to {asked.context_tok:,} tokens of context on {asked.ranks} {asked.gpu}, by lccp init.",
            f"The layout is the first of `lccp plan {asked.out} --suggest --ranks {asked.ranks} --gpu {asked.gpu}`:",
            f"predicted, not measured: {best.memory_bytes / GIB:.1f} GiB on the worst rank, {time_text(step)} a step, "
            f"{digits_text(best.days * 24 * asked.ranks)} GPU-hours.",
            f"The text has about {text_tok:,} tokens. A context beyond the model's own gets {what}; see docs/models.md.",
            "Check what is yours to choose: tokens, mixture, lr, monitors. Every field: lccp train --help",
        )
    )
