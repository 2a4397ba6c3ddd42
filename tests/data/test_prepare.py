"""Preparing data: what is on disk afterwards, what a second call does, and what an interruption leaves behind."""

import dataclasses
import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lccp.config.tree import Config, Source, TokenizerConfig
from megatron_lccp.data.manifest import check_data, load_manifest, prefix
from megatron_lccp.data.prepare import prepare
from megatron_lccp.data.sources.files import JsonLines, TextFiles
from megatron_lccp.data.sources.generated import Biographies, RepeatedSegments
from megatron_lccp.data.sources.stdlib import PythonStdlib
from megatron_lccp.data.tokenizers.load import train_tokenizer
from megatron_lccp.lock import sole_user
from tests.data.small import small_config


@dataclass(frozen=True)
class Listed(Source):
    """The texts it is given; with `breaks_after` it raises after so many."""

    texts: tuple[str, ...] = ()
    breaks_after: int = -1

    def documents(self, vocab_size: int) -> Iterator[str]:
        for index, text in enumerate(self.texts):
            if index == self.breaks_after:
                raise KeyboardInterrupt
            yield text


@dataclass(frozen=True)
class Ids(Source):
    """One document of token ids beside a harmless one."""

    ids: tuple[int, ...] = ()

    def documents(self, vocab_size: int) -> Iterator[list[int]]:
        yield [300]
        yield list(self.ids)


def quiet(line: str) -> None:
    pass


def documents_on_disk(config: Config, source: str, part: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix(config.data.dir, source, part))
    return [dataset[i].tolist() for i in range(len(dataset))]


def with_sources(config: Config, **sources: Source) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def state(directory: str) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in sorted(Path(directory).iterdir())}


@pytest.fixture
def listed(tmp_path, tokenizer) -> Config:
    """Two sources of 30 short texts, prepared with the shared tokenizer into a directory of this test's own."""
    texts = tuple(f"text number {i}\nof a list" for i in range(30))
    given = small_config(
        tmp_path, tokenizer=dataclasses.replace(small_config(tmp_path).data.tokenizer, path=str(tokenizer.path))
    )
    given = with_sources(given, a=Listed(texts), b=Listed(tuple(t.upper() for t in texts)))
    given = dataclasses.replace(given, stages={})
    prepare(given, quiet)
    return given


def test_every_document_is_on_disk_once_with_its_end_token(config, tokenizer):
    manifest = load_manifest(config.data.dir)
    assert list(manifest.sources) == list(config.data.sources)
    for name, source in config.data.sources.items():
        expected = [
            (tokenizer.encode(doc) if isinstance(doc, str) else doc) + [tokenizer.eod]
            for doc in source.documents(tokenizer.vocab_size)
        ]
        train, heldout = (documents_on_disk(config, name, part) for part in ("train", "heldout"))
        assert train and heldout
        assert sorted(train + heldout) == sorted(expected)
        assert [doc for doc in expected if doc in heldout] == heldout  # in the order of the source
        entry = manifest.sources[name]
        assert entry.documents == {"train": len(train), "heldout": len(heldout)}
        assert entry.tokens == {"train": sum(map(len, train)), "heldout": sum(map(len, heldout))}
        assert entry.definition["source"]["class_path"] == f"megatron_lccp.data.sources.{type(source).__name__}"
    assert manifest.tokenizer.sha256 == tokenizer.sha256 and manifest.tokenizer.vocab_size == 1024
    assert check_data(config) == check_data(config, verify=True) == []
    assert IndexedDataset(prefix(config.data.dir, "files", "train")).index.dtype == np.uint16


def test_documents_begin_with_a_token_where_that_is_wanted(listed, tokenizer):
    """The data say so, are made anew where it changes, and stay of the first format without."""
    path = Path(listed.data.dir) / "manifest.json"
    assert json.loads(path.read_text())["format"] == 1 and "bos" not in json.loads(path.read_text())["tokenizer"]

    def wanting(bos: str, documents: bool = True) -> Config:
        given = dataclasses.replace(listed.data.tokenizer, bos=bos, bos_in_documents=documents)
        return dataclasses.replace(listed, data=dataclasses.replace(listed.data, tokenizer=given))

    plain = documents_on_disk(listed, "a", "train")
    assert check_data(wanting("<unk>", documents=False)) == []
    assert "begin with None, not 1" in check_data(wanting("eod"))[0] and check_data(wanting("auto"))
    begun = wanting("<unk>")
    (problem,) = check_data(begun)
    assert problem.startswith("data.tokenizer.bos_in_documents: documents in ") and "begin with None, not 0" in problem
    prepare(begun, quiet)
    assert check_data(begun) == [] and documents_on_disk(begun, "a", "train") == [[0, *ids] for ids in plain]
    assert load_manifest(begun.data.dir).tokenizer.bos == 0 and json.loads(path.read_text())["format"] == 2
    assert "begin with 0, not None" in check_data(listed)[0]


def test_a_held_out_package_is_held_out_as_files_and_as_a_whole(listed, tokenizer):
    sources = {"files": PythonStdlib(max_bytes=800_000), "packages": PythonStdlib(grain="package", max_bytes=800_000)}
    config = with_sources(listed, **sources)
    manifest = prepare(config, quiet)
    modules: dict[tuple[str, str], set[str]] = {}
    for name in sources:
        for part in ("train", "heldout"):
            text = "".join(tokenizer.decode(doc) for doc in documents_on_disk(config, name, part))
            paths = [line.removeprefix("# file: ") for line in text.split("\n") if line.startswith("# file: ")]
            modules[name, part] = {path.split("/")[0].removesuffix(".py") for path in paths}
        tokens = manifest.sources[name].tokens
        assert tokens["heldout"] / sum(tokens.values()) > 0.05  # half of the share at least
    assert modules["packages", "train"] & modules["files", "train"]  # they do overlap
    heldout = modules["packages", "heldout"] | modules["files", "heldout"]
    assert heldout and not heldout & (modules["packages", "train"] | modules["files", "train"])


def test_the_split_depends_on_neither_order_nor_source(listed):
    rng = np.random.default_rng(0)
    texts = tuple(f"document {i}" for i in range(2000))
    shuffled = tuple(texts[i] for i in rng.permutation(2000))
    config = with_sources(listed, one=Listed(texts), other=Listed(shuffled[:1500]))
    prepare(config, quiet)
    one = {part: {tuple(d) for d in documents_on_disk(config, "one", part)} for part in ("train", "heldout")}
    other = {part: {tuple(d) for d in documents_on_disk(config, "other", part)} for part in ("train", "heldout")}
    assert not one["train"] & other["heldout"] and not one["heldout"] & other["train"]
    assert len(one["heldout"] & other["heldout"]) == len(other["heldout"])
    assert 140 < len(one["heldout"]) < 260  # share 0.1 of 2000, five standard deviations


def test_a_source_whose_share_catches_nothing_holds_out_one_document_everywhere(listed):
    """With a share of one in a million somebody must be forced; the same text in another source goes with it."""
    config = dataclasses.replace(listed, data=dataclasses.replace(listed.data, heldout_share=1e-6))
    config = with_sources(config, few=Listed(("x", "y", "z")), more=Listed(("z", "y", "x", "w", "v", "u", "t")))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=config.data.dir + "2"))
    prepare(with_sources(config, more=config.data.sources["more"]), quiet)
    prepare(config, quiet)  # what `few` holds out now was perhaps in the training part of `more`
    parts = {
        (n, p): {tuple(d) for d in documents_on_disk(config, n, p)}
        for n in ("few", "more")
        for p in ("train", "heldout")
    }
    assert all(parts.values())
    heldout = parts["few", "heldout"] | parts["more", "heldout"]
    assert not heldout & (parts["few", "train"] | parts["more", "train"])


def test_nothing_is_done_twice(config):
    before = state(config.data.dir)
    lines: list[str] = []
    start = time.monotonic()
    manifest = prepare(config, lines.append)
    assert time.monotonic() - start < 0.5
    assert manifest == load_manifest(config.data.dir)
    assert state(config.data.dir) == before
    assert lines == [f"{config.data.dir}: up to date, 4 sources"]


def test_only_what_changed_is_rebuilt(listed):
    before = state(listed.data.dir)
    changed = with_sources(
        listed, a=listed.data.sources["a"], b=Listed(tuple(f"new {i}" for i in range(40))), c=Biographies(count=9)
    )
    prepare(changed, quiet)
    after = state(listed.data.dir)
    assert {name for name in after if after[name] != before.get(name)} == {
        "manifest.json", *(f"{n}.{p}.{s}" for n in "bc" for p in ("train", "heldout") for s in ("bin", "idx"))
    }  # fmt: skip
    assert sorted(load_manifest(listed.data.dir).sources) == ["a", "b", "c"]
    assert check_data(changed, verify=True) == []
    assert check_data(listed) == [
        f"{listed.data.dir}/manifest.json: source 'b' has changed since; run `lccp prepare CONFIG`"
    ]
    os.truncate(f"{listed.data.dir}/a.train.bin", 10)
    lines: list[str] = []
    prepare(changed, lines.append)
    assert len(lines) == 1 and lines[0].startswith("a: ")
    assert check_data(changed, verify=True) == []


def test_another_held_out_share_is_another_split(listed):
    more = dataclasses.replace(listed, data=dataclasses.replace(listed.data, heldout_share=0.4))
    assert len(check_data(more)) == 2 and check_data(more)[0].endswith(
        "source 'a' has changed since; run `lccp prepare CONFIG`"
    )
    before = load_manifest(listed.data.dir).sources["a"].documents["heldout"]
    assert prepare(more, quiet).sources["a"].documents["heldout"] > before
    assert check_data(more) == []


def test_new_content_of_the_users_files_is_noticed(listed, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    config = with_sources(listed, own=TextFiles(glob=f"{tmp_path}/*.txt"))
    prepare(config, quiet)
    (tmp_path / "3.txt").write_text("another text")
    prepare(config, quiet)
    written = documents_on_disk(config, "own", "train") + documents_on_disk(config, "own", "heldout")
    assert len(written) == 20 and len(set(map(len, written))) > 1


@pytest.mark.parametrize("breaks_after", [0, 12])
def test_an_interruption_leaves_the_old_state(listed, breaks_after, monkeypatch):
    before = state(listed.data.dir)
    texts = listed.data.sources["b"].texts
    broken = with_sources(listed, a=Listed(texts), b=Listed(texts, breaks_after))
    with pytest.raises(KeyboardInterrupt):
        prepare(broken, quiet)
    monkeypatch.setattr(
        "megatron_lccp.data.prepare.forced_heldout", lambda *_: frozenset()
    )  # so that it breaks while writing
    with pytest.raises(KeyboardInterrupt):
        prepare(broken, quiet)
    assert state(listed.data.dir) == before
    assert check_data(listed, verify=True) == []


def test_an_interruption_between_the_files_is_not_taken_for_whole(listed, monkeypatch):
    texts = listed.data.sources["b"].texts
    changed = with_sources(listed, a=listed.data.sources["a"], b=Listed(texts + ("one more",)))
    moved = []

    def replace(source, target, real=os.replace):
        if str(target).endswith("b.heldout.bin"):
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            prepare(changed, quiet)
    assert moved == ["manifest.json", "b.train.bin", "b.train.idx"]
    for config in (listed, changed):
        assert check_data(config) == [f"{listed.data.dir}/manifest.json: has no source 'b'; run `lccp prepare CONFIG`"]
    prepare(changed, quiet)
    assert check_data(changed, verify=True) == []
    assert not [name for name in os.listdir(listed.data.dir) if name.startswith(".")]


def test_what_a_killed_preparation_left_goes_with_the_next(listed):
    """It had no time to remove it; the lock says that its process is gone."""
    left = Path(listed.data.dir, ".building-x9")
    left.mkdir()
    (left / "b.train.bin").touch()
    texts = listed.data.sources["b"].texts
    prepare(with_sources(listed, a=listed.data.sources["a"], b=Listed(texts + ("one more",))), quiet)
    assert not [name for name in os.listdir(listed.data.dir) if name.startswith(".")]


def test_several_preparations_of_one_directory_wait_for_one(listed):
    said: list[list[str]] = [[], []]
    config = with_sources(listed, a=listed.data.sources["a"], b=Listed(("one", "more") * 50))
    with sole_user(Path(listed.data.dir, ".lock"), "tokens"):
        both = [threading.Thread(target=prepare, args=(config, lines.append)) for lines in said]
        for thread in both:
            thread.start()
        while not all(said):
            time.sleep(0.01)
    for thread in both:
        thread.join()
    assert all("waits for another job on " in lines[0] for lines in said)
    assert sorted("up to date" in lines[-1] for lines in said) == [False, True]
    assert check_data(config, verify=True) == []


def test_first_interruption_leaves_no_manifest(tmp_path):
    sources = {"a": Listed(("x" * 50, "y", "z") * 99), "b": Listed(("x", "y"), 1)}
    settings = TokenizerConfig(path=str(tmp_path / "tok.model"), train_on=("a",), vocab_size=265)
    config = small_config(tmp_path, sources=sources, tokenizer=settings)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, quiet)
    assert not Path(config.data.dir).exists() or os.listdir(config.data.dir) == []
    assert check_data(config) == [f"{config.data.dir}/manifest.json: is missing; run `lccp prepare CONFIG`"]


@pytest.mark.parametrize(("room", "where"), [(1000, "tok.model"), (20_000, "tokens")])
def test_no_room_names_the_place_and_leaves_nothing_half_written(tmp_path, room, where):
    """The kernel refuses to let a file grow past a limit: what a full disk does, for the tokenizer and for tokens."""
    config = small_config(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written: File too large; ") as caught:
            prepare(config, say=lambda text: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / where)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["tok.model"])


def test_problems_are_named(config, tmp_path):
    """Each of the ways in which data can be wrong at the start of a training, on copies of one directory."""
    for file in Path(config.data.dir).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(tmp_path)))
    assert check_data(moved, verify=True) == []
    (tmp_path / "files.train.idx").unlink()
    size = os.path.getsize(tmp_path / "packages.heldout.bin")
    os.truncate(tmp_path / "packages.heldout.bin", size - 2)
    with open(tmp_path / "people.train.bin", "r+b") as file:
        file.write(b"\xff\xff")
    sizes, remedy = f"{size - 2} bytes, not {size}", "run `lccp prepare CONFIG"
    expected = [
        f"{tmp_path}/files.train.idx: is missing; {remedy}`",
        f"{tmp_path}/packages.heldout.bin: is truncated or changed: {sizes}; {remedy}`",
    ]
    assert check_data(moved) == expected
    changed = "its content has changed: the sha256 is not that of the manifest"
    assert check_data(moved, verify=True) == [*expected, f"{tmp_path}/people.train.bin: {changed}; {remedy} --verify`"]
    prepare(moved, quiet)
    assert len(check_data(moved, verify=True)) == 1
    prepare(moved, quiet, verify=True)
    assert check_data(moved, verify=True) == []

    other = train_tokenizer(tmp_path / "other.model", ["some other words\n" * 50, "and more of them"], 275)
    settings = dataclasses.replace(config.data.tokenizer, path=str(other.path))
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=settings))
    (problem,) = check_data(wrong)
    assert problem.startswith(
        f"{other.path}: wrong tokenizer for the data in {config.data.dir}: sha256 {other.sha256[:12]}"
    )
    other.path.unlink()
    assert check_data(wrong) == [f"{other.path}: the tokenizer cannot be read: No such file or directory"]


def test_a_source_that_is_not_prepared_is_named(config):
    stage = config.stages["lccp"]
    part = dataclasses.replace(stage.mixture["long"], sources={"books": 1.0, "people": 1.0})
    more = dataclasses.replace(
        dataclasses.replace(config, stages={"lccp": dataclasses.replace(stage, mixture={"long": part})}),
        data=dataclasses.replace(config.data, sources={}),
    )
    assert check_data(more) == [f"{config.data.dir}/manifest.json: has no source 'books'; run `lccp prepare CONFIG`"]


def test_a_manifest_that_is_none_of_ours_is_named(tmp_path):
    config = small_config(tmp_path, dir=str(tmp_path))
    for text, problem in [
        ("{", "manifest.json: is not a manifest"), ("[]", "manifest.json: is not a manifest"),
        ("\udce9", "manifest.json: is not a manifest"),
        (json.dumps({"format": 99}), "manifest.json: has format 99, written by a newer megatron_lccp"),
        (json.dumps({"format": 1, "sources": {}}), "manifest.json: is not a manifest"),
        (json.dumps({"format": "1", "sources": {}}), "manifest.json: has format '1', which is none"),
    ]:  # fmt: skip
        (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
        (said,) = check_data(config)
        assert problem in said and "\n" not in said


def test_another_tokenizer_rebuilds_its_sources_and_spares_strange_ones(listed, tmp_path):
    other = train_tokenizer(tmp_path / "other.model", listed.data.sources["a"].texts, 290)
    settings = dataclasses.replace(listed.data.tokenizer, path=str(other.path))
    config = dataclasses.replace(listed, data=dataclasses.replace(listed.data, tokenizer=settings))
    before = state(listed.data.dir)
    with pytest.raises(ValueError, match="data.dir: .* holds sources of another tokenizer .*: b; prepare into another"):
        prepare(with_sources(config, a=listed.data.sources["a"]), quiet)
    assert state(listed.data.dir) == before
    prepare(config, quiet)
    assert check_data(config, verify=True) == []
    texts = {other.decode(ids) for part in ("train", "heldout") for ids in documents_on_disk(config, "b", part)}
    assert texts == set(listed.data.sources["b"].texts)


@pytest.mark.parametrize(
    "sources, problem",
    [
        ({"a/b": RepeatedSegments()}, "data.sources: 'a/b' should be letters"),
        ({"one": Listed(("same", "same", ""))}, "data.sources.one: needs at least two different documents"),
        ({"none": Listed(())}, "data.sources.none: needs at least two different documents"),
        ({"own": TextFiles(glob="nowhere/*.txt")}, "TextFiles.glob: 'nowhere/.*' matches no file"),
        ({"own": JsonLines(glob="nowhere/*.txt")}, "JsonLines.glob: 'nowhere/.*' matches no file"),
        ({"ids": Ids((5, 1, 7))}, "data.sources.ids: token ids should be 0..1023 without the end token 1"),
        ({"ids": Ids((5, 1024))}, "data.sources.ids: token ids should be 0..1023"),
    ],
)
def test_wrong_sources_are_named(listed, sources, problem):
    before = state(listed.data.dir)
    with pytest.raises(ValueError, match=problem):
        prepare(with_sources(listed, **listed.data.sources, **sources), quiet)
    assert state(listed.data.dir) == before


def test_without_a_tokenizer_and_without_training_it(tmp_path):
    config = small_config(tmp_path)
    settings = dataclasses.replace(config.data.tokenizer, train_on=())
    with pytest.raises(
        ValueError, match="data.tokenizer.path: .*tok.model does not exist and data.tokenizer.train_on is empty"
    ):
        prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=settings)), quiet)


def test_a_directory_prepared_elsewhere_is_taken_as_it_is(config, tmp_path):
    here = with_sources(config)
    assert prepare(here, quiet) == load_manifest(config.data.dir)
    with pytest.raises(ValueError, match="manifest.json: is missing"):
        prepare(dataclasses.replace(here, data=dataclasses.replace(here.data, dir=str(tmp_path))), quiet)


def test_a_huge_document_is_one_document(tmp_path, config, tokenizer):
    """A text far longer than what is encoded at once, with sentencepiece's space mark in it."""
    long_text = "word \u2581 \n" * 300_000
    own = with_sources(config, long=Listed((long_text, "short", "", "other", "")))
    own = dataclasses.replace(own, data=dataclasses.replace(own.data, dir=str(tmp_path)))
    prepare(own, quiet)
    written = documents_on_disk(own, "long", "train") + documents_on_disk(own, "long", "heldout")
    assert sorted(map(tokenizer.decode, written)) == sorted([long_text, "short", "other"])  # the empty ones left out


def test_stdlib_is_rebuilt_for_another_python(config, monkeypatch):
    monkeypatch.setattr(PythonStdlib, "inputs", lambda self: "Python 9.9.9")
    from megatron_lccp.data import prepare as module

    old = load_manifest(config.data.dir)
    stale = [name for name in config.data.sources if not module._is_current(config, name, old, verify=False)]
    assert stale == ["files", "packages"]
