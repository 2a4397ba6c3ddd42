"""Which files a published model is made of, and what is refused before anything opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lccp.weights.published import find_published

pytestmark = pytest.mark.once
LLAMA = {"model_type": "llama"}


def folder_of(path: Path, config: dict | None, **files: bytes | dict) -> Path:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        file = path / name.replace("__", "-").replace("_dot_", ".")
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_the_files_of_a_model_are_found_and_hashed(tmp_path: Path) -> None:
    whole = find_published(str(folder_of(tmp_path / "whole", LLAMA, model_dot_safetensors=b"1", pytorch_dot_bin=b"2")))
    assert (whole.name, [p.name for p in whole.weights], whole.bytes) == ("whole", ["model.safetensors"], 1)
    index = {"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors", "c": "model-1.safetensors"}}
    parts = {"model__1_dot_safetensors": b"12", "model__2_dot_safetensors": b"3"}
    cut = folder_of(tmp_path / "cut", LLAMA, model_dot_safetensors_dot_index_dot_json=index, **parts)
    found = find_published(str(cut))
    assert [p.name for p in found.weights] == ["model-1.safetensors", "model-2.safetensors"]
    before = found.sha256
    (cut / "model-2.safetensors").write_bytes(b"4")
    assert find_published(str(cut)).sha256 != before
    single = folder_of(tmp_path / "gguf", None, Some_dot_Q4_dot_gguf=b"GGUF")
    for given in (single, single / "Some.Q4.gguf"):
        found = find_published(str(given))
        assert (found.name, found.folder, found.gguf) == ("Some.Q4", single, "Some.Q4.gguf")


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        (None, {}, "has neither a config.json nor a .gguf file"),
        (None, {"a_dot_gguf": b"", "b_dot_gguf": b""}, "has 2 .gguf files; name one of them"),
        (LLAMA, {}, "holds no model*.safetensors"),
        (LLAMA, {"pytorch_model_dot_bin": b""}, "pickles (pytorch_model.bin), which can run code and are not opened"),
        (LLAMA, {"adapter_config_dot_json": {}}, "is an adapter of another model"),
        (
            {"model_type": "mine", "auto_map": {}},
            {},
            "no language model of the type 'mine', and the code in the folder",
        ),
        ({"model_type": "bert_of_2031"}, {}, "a newer one may have it"),
        (LLAMA, {"model_dot_safetensors_dot_index_dot_json": {"weight_map": {"a": "x.safetensors"}}}, "lacks x.safet"),
        (LLAMA, {"model_dot_safetensors_dot_index_dot_json": {}}, "has no weight_map"),
        (LLAMA, {"model_dot_safetensors_dot_index_dot_json": b"{"}, "cannot be read as JSON"),
    ],
)
def test_what_is_no_model_or_may_not_be_opened(tmp_path: Path, config: dict | None, files: dict, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        find_published(str(folder_of(tmp_path / "model", config, **files)))
    text = str(refused.value)
    assert said in text and text.startswith("--hf: ") and "\n" not in text


def test_a_name_of_the_hub_without_a_network_names_the_folder_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"^--hf: nobody/nothing .*; name a folder with config.json and \*.safetensors$"
    ):
        find_published("nobody/nothing")
    with pytest.raises(ValueError, match="neither a folder, nor a .gguf file, nor the name of a model on the hub"):
        find_published("no/such/folder")
