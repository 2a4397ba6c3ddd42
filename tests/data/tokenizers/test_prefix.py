"""Tokenizers that put a space before every text (Llama 2, Mistral v0.1, TinyLlama), against transformers' own ids."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.needles import NeedleSetSpec, build_needle_set, encode_fact
from megatron_lccp.data.people.facts import FAMILIES
from megatron_lccp.data.tokenizers.base import SPACE_MARK, Tokenizer
from megatron_lccp.data.tokenizers.load import load_tokenizer
from tests.data.tokenizers.test_sentencepiece import NASTY

pytest.importorskip("tokenizers")
LAYOUTS = ("sentencepiece", "legacy", "first", "always", "bytes")
"""Of Llama 2: its own model file, tokenizer.json as transformers 4 wrote it, and as later ones do. bytes: RoBERTa's way."""
BEGIN, END = "<s>", "</s>"


def documents() -> list[str]:
    return [path.read_text() for path in sorted(Path("megatron_lccp/data").glob("*.py"))]


def write_model(folder: Path) -> None:
    """A sentencepiece model with the options of Llama 2's."""
    folder.mkdir()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in documents() for line in text.splitlines() if line.strip()]),
            model_writer=file, model_type="bpe", vocab_size=700, normalization_rule_name="identity",
            add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            byte_fallback=True, split_digits=True, minloglevel=2,
        )  # fmt: skip


def write_json(folder: Path, layout: str) -> None:
    """The pieces of the model of a folder beside this one as tokenizer.json; `bytes`: byte pairs of its own."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder.mkdir()
    if layout == "bytes":
        made = Fast(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [BEGIN, END]
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(documents(), trainer)
    else:
        model = sentencepiece.SentencePieceProcessor(str(folder.parent / "sentencepiece/tokenizer.model"))
        pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
        pairs = [(p[:at], p[at:]) for p in pieces for at in range(1, len(p)) if p[:at] in pieces and p[at:] in pieces]
        merges = sorted(pairs, key=lambda pair: (pieces["".join(pair)], pieces[pair[0]], pieces[pair[1]]))
        made = Fast(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if layout == "legacy":
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)]
            )
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme=layout, split=False)
        blanks = decoders.Replace(SPACE_MARK, " ")
        made.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        made.add_special_tokens(["<unk>", BEGIN, END])
    number = made.token_to_id(BEGIN)
    made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, number)])
    made.save(str(folder / "tokenizer.json"))
    kind = "PreTrainedTokenizerFast" if layout == "bytes" else "LlamaTokenizer"
    about = {"tokenizer_class": kind, "bos_token": BEGIN, "eos_token": END, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prefix")
    write_model(root / "sentencepiece")
    for layout in LAYOUTS[1:]:
        write_json(root / layout, layout)
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Tokenizer]:
    return {layout: load_tokenizer(folder / layout, bos="auto") for layout in LAYOUTS}


def own_ids(folder: Path, layout: str, text: str) -> list[int]:
    """What the library that the files are written for makes of a text, its begin token included."""
    if layout == "sentencepiece":
        return sentencepiece.SentencePieceProcessor(str(folder / layout / "tokenizer.model")).encode(text, add_bos=True)
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder / layout).encode(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_the_tokenizer_itself(folder: Path, loaded: dict[str, Tokenizer], layout: str) -> None:
    """Of a document, and of a text put together from ids: the space stands at its front and nowhere within."""
    tokenizer = loaded[layout]
    text = Path("megatron_lccp/data/needles.py").read_text() + " 日本 é  x\n\n"
    assert [tokenizer.bos, *tokenizer.encode_document(text)] == own_ids(folder, layout, text)
    assert tokenizer.encode_batch([text, "x"], threads=2) == [tokenizer.encode_document(t) for t in (text, "x")]
    parts = ["The hay is dry.", " The hobby of Ann is chess.", "\nQuestion: What?\nAnswer:", " The hobby"]
    ids = tokenizer.encode_document(parts[0]) + [i for part in parts[1:] for i in tokenizer.encode(part)]
    assert [tokenizer.bos, *ids] == own_ids(folder, layout, "".join(parts))
    assert tokenizer.encode_document("a") != tokenizer.encode("a") and tokenizer.decode(ids) == " " + "".join(parts)
    assert (tokenizer.id_of(BEGIN), tokenizer.id_of(END)) == (tokenizer.bos, tokenizer.eod)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=60), st.lists(st.one_of(NASTY, st.just(END)), max_size=12).map("".join)))
def test_any_text_comes_back_without_the_space(loaded: dict[str, Tokenizer], layout: str, text: str) -> None:
    text = text.encode(errors="ignore").decode()  # (lone surrogates are no text)
    tokenizer, as_space = loaded[layout], (layout not in ("sentencepiece", "bytes"))
    expected = text.replace(SPACE_MARK, " ") if as_space else text  # such a layout cannot tell them apart
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected and tokenizer.eod not in ids and tokenizer.bos not in ids
    assert tokenizer.decode(tokenizer.encode_document(text)) in (expected, f" {expected}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_needles_stand_in_the_text_as_the_model_would_read_them(loaded: dict[str, Tokenizer], layout: str) -> None:
    """A sample begins with the begin token, and is the ids of its text; names and values are found in the needle."""
    tokenizer = loaded[layout]
    spec = NeedleSetSpec(("biography", "single"), (400,), (0.0, 0.5), samples=2, haystacks=("bundled/biographies",))
    made = build_needle_set(spec, tokenizer, lambda name: bundled_tokens(name, tokenizer, 1000))
    for s in made.samples:
        fact = FAMILIES[s.family](s.sample, random.Random(s.seed))
        assert (s.length_tok, s.begin_tok, s.tokens[0]) == (400, 1, tokenizer.bos)
        assert not {tokenizer.bos, tokenizer.eod} & set(s.tokens[1:].tolist())
        needle = tokenizer.decode(s.tokens[slice(*s.needle)])
        assert needle == f" {fact.sentence}" and tokenizer.decode(s.tokens[slice(*s.answer)]) == needle
        ids, content, _ = encode_fact(fact, tokenizer)
        slots = tokenizer.decode([i for i, inside in zip(ids, content) if inside])
        assert fact.name in slots and fact.value in slots and len(slots) < len(needle) - 5


def test_the_end_token_of_a_sentencepiece_model(folder: Path, loaded: dict[str, Tokenizer]) -> None:
    path = folder / "sentencepiece"
    own, named = load_tokenizer(path), load_tokenizer(path, end_token=END)
    assert own.eod == named.eod == 2 and own.bos is None and own.sha256 != named.sha256
    assert load_tokenizer(path, end_token=BEGIN).eod == 1
    for wrong in ("return", "<eod>"):
        with pytest.raises(
            ValueError, match=f"has no control piece '{wrong}' to end documents; see data.tokenizer.end"
        ):
            load_tokenizer(path, end_token=wrong)


def test_which_token_a_sequence_begins_with(folder: Path) -> None:
    """auto: what the files add, the template first; else the end of a document."""
    legacy = folder / "legacy"
    about = json.loads((legacy / "tokenizer_config.json").read_text())
    tree = json.loads((legacy / "tokenizer.json").read_text())
    template, bare = tree["post_processor"], tree | {"post_processor": None}
    two = json.loads(json.dumps(template))
    two["single"].insert(0, two["single"][0])
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)

    def begins(bos: str, tree: dict, **more: bool) -> int | None:
        (copy / "tokenizer.json").write_text(json.dumps(tree))
        (copy / "tokenizer_config.json").write_text(json.dumps(about | more))
        return load_tokenizer(copy, bos=bos).bos

    assert [begins(bos, tree) for bos in ("none", "auto", "eod", BEGIN, END)] == [None, 1, 2, 1, 2]
    assert begins("auto", bare) == 2 and begins("auto", bare, add_bos_token=True) == 1
    assert begins("auto", bare, add_bos_token=False) == 2 and begins("auto", tree, add_bos_token=False) == 1
    for bos, said in (("<none>", "has no token '<none>' to begin with"), ("e", "'e' is a token of text; data.token")):
        with pytest.raises(ValueError, match=said):
            begins(bos, tree)
    with pytest.raises(ValueError, match="begins a text with 2 tokens; name one with data.tokenizer.bos"):
        begins("auto", tree | {"post_processor": two})
    model = folder / "sentencepiece"
    assert load_tokenizer(model, bos="auto").bos == 1
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
    (copy / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(copy, bos="auto").bos == 2
