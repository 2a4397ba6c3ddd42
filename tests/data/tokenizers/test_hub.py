"""Hugging Face's tokenizer.json and tiktoken files through the one interface, against the libraries' own reading."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.config.load import parse_config
from megatron_lccp.data.manifest import check_data, load_manifest
from megatron_lccp.data.prepare import prepare
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.data.tokenizers.files import HUNYUAN_SPECIAL, SINGLE_DIGITS
from megatron_lccp.data.tokenizers.load import as_tokenizer, load_tokenizer
from tests.data.tokenizers.hub_files import END, OTHER, write_tiktoken, write_tokenizer_json
from tests.data.tokenizers.test_sentencepiece import NASTY
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_tree

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")
VOCAB = 700
KINDS = ("tokenizer.json", "hy.tiktoken")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    documents = [path.read_text() for path in sorted(Path("megatron_lccp/data").glob("*.py"))]
    made = write_tokenizer_json(root / "tokenizer.json", documents, SINGLE_DIGITS, VOCAB)
    write_tiktoken(root / "hy.tiktoken", made)
    return root


@pytest.fixture(scope="session")
def loaded(hub: Path) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(hub / kind) for kind in KINDS}  # folders


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.lists(st.one_of(NASTY, st.just(END)), max_size=12).map("".join)))
def test_any_text_comes_back_and_never_holds_a_special_token(loaded, kind, text):
    text = text.encode(errors="ignore").decode()  # (lone surrogates are no text)
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode([*ids, tokenizer.eod]) == text
    assert all(isinstance(i, int) and 0 <= i < tokenizer.ordinary_size for i in ids)
    assert tokenizer.encode_batch([text, "x"], threads=2) == [ids, tokenizer.encode("x")]


def test_both_read_the_same_merges(loaded, hub):
    """One as the library itself does, one as transformers does; the ids are the same, for the merges are."""
    from tokenizers import Tokenizer as Fast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    text = Path("megatron_lccp/data/people/facts.py").read_text() + " 12345 日本語 \u00e9\r\n\n\t  end" + " " * 50
    expected = Fast.from_file(str(hub / "tokenizer.json" / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    converted = TikTokenConverter(str(hub / "hy.tiktoken" / "hy.tiktoken"), pattern=SINGLE_DIGITS).converted()
    assert converted.encode(text).ids == expected and len(set(expected)) > 300
    for tokenizer in loaded.values():
        assert tokenizer.encode(text) == expected
        assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.ordinary_size) == (VOCAB, VOCAB - 2, VOCAB - 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_long_run_of_blanks_is_text_like_any_other(loaded, kind):
    text = "a" + " " * 1_000_000 + "b\n"
    ids = loaded[kind].encode(text)
    assert loaded[kind].decode(ids) == text and loaded[kind].encode_batch(["x", text])[1] == ids


def test_what_is_beside_the_file_is_part_of_the_tokenizer(hub, tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind
        shutil.copytree(hub / kind, folder)
        before = load_tokenizer(folder / kind)
        assert load_tokenizer(folder).sha256 == before.sha256
        other = load_tokenizer(folder, end_token=OTHER)
        assert other.eod == before.eod + 1 and other.sha256 != before.sha256
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "HYTokenizer"}))
        with pytest.raises(
            ValueError, match="no file beside it has an eos_token; name one with data.tokenizer.end_tok"
        ):
            load_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps({"eos_token_id": [VOCAB - 1, 3]}))
        assert load_tokenizer(folder).eod == VOCAB - 1
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "return"}))
        with pytest.raises(ValueError, match="'return' in a text would end the document|no token 'return'"):
            load_tokenizer(folder)
    hunyuan = load_tokenizer(tmp_path / "hy.tiktoken", HUNYUAN_SPECIAL[3])
    assert hunyuan.vocab_size == VOCAB - 2 + len(HUNYUAN_SPECIAL) and hunyuan.eod == VOCAB - 2 + 3


def test_unicode_normalisation_is_all_that_may_change_a_text(hub, tmp_path):
    """Qwen's files compose characters (NFC); one that also takes blanks away is refused."""
    tree = json.loads((hub / "tokenizer.json" / "tokenizer.json").read_text())
    shutil.copytree(hub / "tokenizer.json", tmp_path / "nfc")
    path = tmp_path / "nfc" / "tokenizer.json"
    path.write_text(json.dumps(tree | {"normalizer": {"type": "NFC"}}))
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer.decode(tokenizer.encode("cafe\u0301  x ")) == "caf\u00e9  x "
    path.write_text(json.dumps(tree | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}))
    with pytest.raises(ValueError, match="does not give text back unchanged"):
        load_tokenizer(path.parent)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer.json"),
        ("x.tiktoken", "IQ== 0\nSg== 2\n", "its ranks are not 0 to 1, each once"),
        ("x.tiktoken", "IQ== 0\n!! 1\n", "line 2 is no base64 sequence and rank"),
        ("none.json", None, "the tokenizer cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, text, problem):
    config = {"tokenizer_class": "HYTokenizer", "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: {problem}") as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_a_folder_has_to_hold(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match="expected a tokenizer.json, one .*tiktoken or a tokenizer.model"):
        load_tokenizer(tmp_path)
    shutil.copytree(hub / "hy.tiktoken", tmp_path / "unknown")
    (tmp_path / "unknown" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine"}))
    with pytest.raises(ValueError, match="tokenizer_class in tokenizer_config.json beside it is 'Mine', not one of"):
        load_tokenizer(tmp_path / "unknown")
    for library, kind in zip(("tokenizers", "tiktoken"), KINDS):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=rf"needs the package {library}; pip install 'megatron_lccp\[convert\]'"):
            load_tokenizer(hub / kind)


def test_an_object_that_puts_a_space_in_front_is_refused(hub):
    """Llama 2's does, and takes it away when it decodes: a text comes back, one put together from ids does not."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, normalizers

    made = Fast.from_file(str(hub / "tokenizer.json" / "tokenizer.json"))
    given = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    assert as_tokenizer(given).encode(" a b") == given.encode(" a b", add_special_tokens=False)
    made.normalizer = normalizers.Prepend(" ")
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    given = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    assert given.decode(given.encode("\nA b.")) == "\nA b."
    with pytest.raises(ValueError, match="tokenizer: .* a space in front"):
        as_tokenizer(given)


def test_the_begin_token_of_an_object(hub):
    """What transformers' own encode puts first; else the end of a document, or a token by its text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors

    made = Fast.from_file(str(hub / "tokenizer.json" / "tokenizer.json"))

    def begins(bos):
        return as_tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END), bos).bos

    assert [begins(bos) for bos in ("none", "auto", "eod", OTHER)] == [None, VOCAB - 2, VOCAB - 2, VOCAB - 1]
    made.post_processor = processors.TemplateProcessing(single=f"{OTHER} $A", special_tokens=[(OTHER, VOCAB - 1)])
    assert begins("auto") == VOCAB - 1 and begins("none") is None
    with pytest.raises(ValueError, match="tokenizer: .* has no one token that bos='<none>' means; give eod or none"):
        begins("<none>")


def test_prepared_trained_and_measured(hub, tmp_path):
    """From text to two steps and a window of every monitor; documents of drawn ids leave out the special tokens."""
    jobs = []
    for kind in KINDS:
        tree = tiny_tree(tmp_path / kind)
        tree["data"]["tokenizer"] = {"path": str(hub / kind)}
        drawn = {"class_path": "megatron_lccp.data.sources.generated.RepeatedSegments", "init_args": {"count": 40}}
        tree["data"]["sources"]["drawn"] = drawn
        (tmp_path / kind).mkdir()
        path = tmp_path / kind / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        config = parse_config(path)
        prepare(config, say=lambda text: None)
        manifest = load_manifest(config.data.dir)
        assert (manifest.tokenizer.name, manifest.tokenizer.eod) == (kind, VOCAB - 2) and not check_data(config)
        other = parse_config(path, [f"--data.tokenizer.end_token={OTHER}"])
        assert "wrong tokenizer for the data" in check_data(other)[0]
        jobs.append(("train", {"path": path, "overrides": ["--training.steps=2"]}))
    (found,) = run_ranks(1, "several", jobs=jobs)
    for result in found:
        assert result["error"] is None and result["step"] == 2
        assert {row["metric"] for row in result["rows"]} >= {"answer_nll", "exact", "retrieval_score"}
        assert not [event for event in result["events"] if event[0] == "monitor_error"]
