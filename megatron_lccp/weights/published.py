"""A published model on disk: which files it is made of, and what is refused before a library opens one of them.

In: a folder, a .gguf file, or the name of a model on the hub. Out: `Published`. Weights are safetensors or GGUF: a
pickle runs code when it is opened, and so does a model that brings code of its own. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lccp.files import error_text, file_sha256, is_device

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ("*.safetensors", INDEX, "*.json", "tokenizer.model", "*.tiktoken", "*.jinja", "merges.txt")
"""What is downloaded of a model: no pickle, no code."""


@dataclass(frozen=True)
class Published:
    """A model as it was published."""

    name: str
    """How it is called in rows and figures."""
    folder: Path
    """Where its files are."""
    weights: tuple[Path, ...]
    """The files of its weights, in order."""
    gguf: str | None = None
    """Name of the GGUF file, if it is one."""

    @property
    def bytes(self) -> int:
        """Of the files of its weights."""
        return sum(path.stat().st_size for path in self.weights)

    @cached_property
    def sha256(self) -> str:
        """Over the files of its weights, their names included."""
        digest = hashlib.sha256()
        for path in self.weights:
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
        return digest.hexdigest()


def find_published(given: str) -> Published:
    """The model that `--hf` names. Raises ValueError in one line for what is none, or may not be opened."""
    path = Path(given)
    if path.is_file() and path.suffix == ".gguf":
        return Published(path.stem, path.parent, (path,), path.name)
    if path.is_dir():
        return _in_folder(path, Path(path.absolute()).name)
    if path.exists() or is_device(path):
        raise ValueError(
            f"--hf: {given} is no folder of a model and no .gguf file; name the folder with its config.json"
        )
    if HUB_NAME.fullmatch(given):
        return _in_folder(_download(given), given.partition("/")[2])
    raise ValueError(
        f"--hf: {given} is neither a folder, nor a .gguf file, nor the name of a model on the hub (owner/name)"
    )


def _in_folder(folder: Path, name: str) -> Published:
    if not (folder / "config.json").is_file():
        found = sorted(folder.glob("*.gguf"))
        if len(found) == 1:
            return Published(found[0].stem, folder, (found[0],), found[0].name)
        if found:
            raise ValueError(f"--hf: {folder} has {len(found)} .gguf files; name one of them, such as {found[0]}")
        raise ValueError(f"--hf: {folder} has neither a config.json nor a .gguf file, so it is no folder of a model")
    config = read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--hf: {folder} is an adapter of another model; merge the two, and name the merged folder")
    if problem := _foreign_code(config):
        raise ValueError(f"--hf: {folder / 'config.json'}: {problem}")
    return Published(name, folder, _safetensors(folder))


def _safetensors(folder: Path) -> tuple[Path, ...]:
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"--hf: {folder / INDEX}: has no weight_map of file names")
        files = tuple(folder / name for name in sorted(set(names.values())))
        if absent := [path for path in files if not path.is_file()]:
            raise ValueError(f"--hf: {folder} lacks {absent[0].name}, which its index names; copy the folder again")
        return files
    if files := tuple(sorted(folder.glob("model*.safetensors"))):
        return files
    for pattern in PICKLES:
        for path in sorted(folder.glob(pattern)):
            raise ValueError(
                f"--hf: {folder} holds its weights as pickles ({path.name}), which can run code and are not opened; "
                "save the model as safetensors"
            )
    raise ValueError(f"--hf: {folder} holds no model*.safetensors")


def _foreign_code(config: dict[str, Any]) -> str | None:
    """Why transformers would need code from the folder, or cannot build the model at all; None if it can."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    kind = config.get("model_type")
    if kind in CAUSAL:
        return None
    known = f"transformers {transformers.__version__} has no language model of the type {kind!r}"
    if "auto_map" in config:
        return f"{known}, and the code in the folder is not run"
    return f"{known}; a newer one may have it"


def _download(name: str) -> Path:
    """Bring a model of the hub into its cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached"
    except GatedRepoError:
        reason = "its owner wants to be asked first"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private"
    except Exception as error:  # of whichever library speaks with the hub
        reason = " ".join(str(error).split())[:160] or type(error).__name__
    raise ValueError(
        f"--hf: {name} is no folder here, and was not downloaded: {reason}; name a folder with config.json and "
        "*.safetensors"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. ValueError in one line for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--hf: {error_text(error)}") from error
    except ValueError as error:
        raise ValueError(f"--hf: {path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--hf: {path}: is no object of JSON")
    return found
