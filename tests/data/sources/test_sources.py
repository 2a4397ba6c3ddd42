"""What the sources yield: the same every time, and what their fields promise."""

import gzip
import json
import re
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from megatron_lccp.config.load import as_tree, parse_config
from megatron_lccp.data.sources.files import JsonLines, TextFiles
from megatron_lccp.data.sources.generated import Biographies, RepeatedSegments
from megatron_lccp.data.sources.stdlib import PythonStdlib


@pytest.mark.parametrize(
    "source",
    [
        PythonStdlib(max_bytes=50_000),
        PythonStdlib(grain="package", max_bytes=50_000),
        Biographies(count=3),
        RepeatedSegments(count=3),
    ],
)
def test_documents_are_the_same_every_time(source):
    first = list(source.documents(1000))
    assert len(first) >= 1 and first == list(source.documents(1000))


def test_stdlib_files_are_the_modules_of_the_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = dict(doc.removeprefix("# file: ").split("\n", 1) for doc in PythonStdlib().documents(0))
    assert {"abc.py", "json/decoder.py", "asyncio/base_events.py"} <= documents.keys()
    assert documents["json/decoder.py"] == (root / "json/decoder.py").read_text().rstrip() + "\n"
    assert not [p for p in documents if re.search(r"(^|/)(tests?|site-packages)/|_sysconfigdata", p)]
    assert not [p for p, text in documents.items() if str(root) in text]


def test_stdlib_packages_hold_the_same_modules_as_the_files():
    files = {doc for doc in PythonStdlib().documents(0)}
    packages = list(PythonStdlib(grain="package", document_bytes=200_000).documents(0))
    modules = [module for doc in packages for module in re.split(r"(?m)(?=^# file: )", doc) if module]
    assert len(modules) == len(set(modules)) > 300 and set(modules) <= files
    assert max(len(doc.encode()) for doc in packages if doc.count("# file: ") > 1) <= 200_000
    json_package = next(doc for doc in packages if doc.startswith("# file: json/"))
    assert re.findall(r"(?m)^# file: (.*)", json_package) == [
        f"json/{name}.py" for name in ("__init__", "decoder", "encoder", "scanner", "tool")
    ]


def test_stdlib_caps_and_key():
    whole = list(PythonStdlib().documents(0))
    capped = list(PythonStdlib(max_bytes=100_000).documents(0))
    assert capped == whole[: len(capped)]
    assert sum(len(d.encode()) for d in capped[:-1]) < 100_000 <= sum(len(d.encode()) for d in capped)
    long_ones = list(PythonStdlib(min_bytes=60_000).documents(0))
    assert long_ones == [d for d in whole if len(d.encode()) >= 60_000]
    file, package = PythonStdlib(), PythonStdlib(grain="package")
    assert file.split_key("# file: json/decoder.py\nx") == package.split_key("# file: json/__init__.py\ny") == "json"
    assert file.split_key("# file: test/test_json/test_dump.py\n") == "test/test_json"


@pytest.mark.parametrize("questions_at", ["end", "anywhere"])
def test_biographies_answer_with_a_sentence_of_the_document(questions_at):
    source = Biographies(count=5, people_per_document=8, questions_per_document=6, questions_at=questions_at)
    for document in source.documents(0):
        people = re.findall(r"A few words about ([\w ]+)\.", document)
        assert len(set(people)) == 8
        asked = re.findall(r"\nQuestion: (.+)\nAnswer: (.+)", document)
        assert len(asked) == 6
        for question, answer in asked:
            position = document.index(f"Answer: {answer}")
            biographies = "\n".join(
                line for line in document[:position].split("\n") if line.startswith("A few words about")
            )
            assert biographies.count(answer) == 1  # stands before the question, word for word
            assert answer.startswith("The " + re.fullmatch(r"What is the (.+)\?", question)[1] + " is ")
            assert any(name in question for name in people)
        places = [document[: found.start()].count("A few words about") for found in re.finditer("Question:", document)]
        if questions_at == "end":
            assert set(places) == {8}
        else:
            assert len(set(places)) > 2
    assert list(Biographies(count=2, seed=1).documents(0)) != list(Biographies(count=2).documents(0))


@pytest.mark.parametrize("style", ["standard", "paraphrase", "pronoun"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_biographies_in_every_language_and_style(language, style):
    """Questions are the canonical ones; answers stand in the document word for word."""
    source = Biographies(count=6, people_per_document=8, questions_per_document=6, language=language, style=style)
    question, answer, space = ("Question: ", "Answer: ", " ") if language == "en" else ("问题：", "答案：", "")
    texts = list(source.documents(0))
    for document in texts:
        asked = re.findall(f"\n{question}(.+)\n{answer}(.+)", document)
        people = document.split(f"\n{question}")[0]
        assert len(asked) == 6 and len(people.split("\n")) == 8
        for wanted, sentence in asked:
            assert people.count(space + sentence) == 1
            assert re.fullmatch("What is the .+\\?" if language == "en" else ".+(什么|哪里|哪一天|哪一所)？", wanted)
        assert (people.count('"') + people.count("”") > 0) == (style == "pronoun")
        assert ("  " in document) is False and document.endswith("\n")
    others = [Biographies(count=6, people_per_document=8, questions_per_document=6, language=other, style=form)
              for other in ("en", "zh") for form in ("standard", "paraphrase", "pronoun")]  # fmt: skip
    assert sum(list(other.documents(0)) == texts for other in others) == 1
    if style == "paraphrase":
        starts = {line.split(".")[1].split()[0] for text in texts for line in text.split("\n") if line.count(".") > 3}
        assert language == "zh" or len(starts) > 10


def test_segments_come_back_within_a_document():
    source = RepeatedSegments(count=4, length_tok=2000, segment_tok_min=10, segment_tok_max=20, first_id=7)
    seen = set()
    for ids in source.documents(5000):
        assert len(ids) == 2000 and min(ids) >= 7 and max(ids) < 5000
        pairs = list(zip(ids, ids[1:], ids[2:]))
        again = sum(pair in set(pairs[:i]) for i, pair in enumerate(pairs)) / len(pairs)
        assert 0.3 < again < 0.7  # by chance it would be one in millions
        assert not seen & set(pairs)
        seen |= set(pairs)
    assert 4000 < max(max(ids) for ids in source.documents(5000))
    with pytest.raises(ValueError, match="RepeatedSegments.first_id: 300 leaves nothing of 300 ids"):
        next(RepeatedSegments(first_id=300).documents(300))
    with pytest.raises(ValueError, match="RepeatedSegments.segment_tok_min: 9 should be"):
        next(RepeatedSegments(segment_tok_min=9, segment_tok_max=8).documents(300))


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("second \u00e9\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    source = TextFiles(glob=f"{tmp_path}/**/*.txt")
    assert list(source.documents(0)) == ["first", "second \u00e9\n", "third"]
    before = source.inputs()
    (tmp_path / "a.txt").write_text("other")
    assert source.inputs() != before
    (tmp_path / "c.txt").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=r"c\.txt: is not UTF-8 text \(byte 3\)"):
        list(source.documents(0))
    with pytest.raises(ValueError, match=r"TextFiles\.glob: 'nothing/\*' matches no file"):
        list(TextFiles(glob="nothing/*").documents(0))


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\n\\u2028", "id": 3}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "three"}))
    assert list(JsonLines(glob=f"{tmp_path}/*").documents(0)) == ["one", "two\n\u2028", "three"]
    with pytest.raises(ValueError, match=r"JsonLines\.glob: 'nothing' matches no file"):
        list(JsonLines(glob="nothing").documents(0))


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"text": "cut', "is not a JSON object"),
        ('{"txt": "x"}', "has no text in field 'text'"),
        ('["text"]', "has no text in field 'text'"),
        ('{"text": 3}', "has no text in field 'text'"),
        ('{"text": "\\ud800"}', "has half of a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, problem):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    documents = JsonLines(glob=f"{tmp_path}/*.jsonl").documents(0)
    assert list(islice(documents, 1)) == ["good"]
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{problem}"):
        next(documents)


def test_sources_are_read_from_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        """
data:
  sources:
    code: {class_path: megatron_lccp.data.sources.PythonStdlib, init_args: {grain: package, max_bytes: 2e6}}
    people: {class_path: megatron_lccp.data.sources.Biographies, init_args: {count: 7, language: zh, style: pronoun}}
    own: {class_path: megatron_lccp.data.sources.JsonLines, init_args: {glob: "x/*.jsonl", field: body}}
stages:
  a: {tokens: 100, context_tok: 10, global_batch_tok: 10, mixture: {all: {sources: {code: 1, people: 1}}}}
"""
    )
    sources = parse_config(tmp_path / "run.yaml").data.sources
    assert sources == {
        "code": PythonStdlib(grain="package", max_bytes=2_000_000),
        "people": Biographies(count=7, language="zh", style="pronoun"),
        "own": JsonLines(glob="x/*.jsonl", field="body"),
    }
    assert as_tree(sources["people"])["class_path"] == "megatron_lccp.data.sources.Biographies"
