"""Published weights -> a model of transformers, or one line that says why not.

In: a folder, a name on the hub, or a .gguf file. Out: a model of transformers whose weights are all there. Only
safetensors and GGUF are read: pickles can run code, and so can code that comes with a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lccp.parallel.gather import agreed
from megatron_lccp.parallel.groups import Groups

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_model(source: str | Path, groups: Groups, dtype: torch.dtype | str | None, device_map: Any) -> Any:
    """A causal model, on the device of `groups` or where `device_map` puts it; spread over `groups.tp`.

    Raises ValueError in one line, on all ranks alike: file or name, what is wrong, remedy.
    """
    try:
        import transformers

        auto: Any = transformers.AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("transformers is not installed; install megatron_lccp with its convert extra") from error
    if device_map is not None and groups.tp.size() * groups.dp.size() > 1:
        raise ValueError("device_map: spreads the model of one process; under torchrun give a tensor-parallel size")
    with agreed():
        where = _checked(str(source))
        more: dict[str, Any] = dict(dtype=dtype or (torch.float32 if groups.device.type == "cpu" else "auto"))
        if groups.tp.size() > 1:
            more |= dict(tp_plan="auto", device_mesh=_mesh(groups))
        elif device_map is not None:
            more |= dict(device_map=device_map)
        with quiet():
            try:
                model, info = auto.from_pretrained(
                    **where, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **more
                )
            except Exception as error:  # of many kinds, by what is wrong in the files
                raise ValueError(f"{source}: {_reason(error, source)}") from error
        if problem := _does_not_fit(info):
            raise ValueError(f"{source}: {problem}")
    return model if device_map is not None or groups.tp.size() > 1 else model.to(groups.device)


def _checked(source: str) -> dict[str, Any]:
    """Where transformers finds the model. Raises ValueError for what is not read."""
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"{source}: is no file")
        return dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    if path.is_file():
        raise ValueError(f"{source}: is a file; name the folder that holds config.json and *.safetensors, or a .gguf")
    if not path.is_dir():
        if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
            raise ValueError(f"{source}: is no folder; name one that holds config.json and *.safetensors")
        return dict(pretrained_model_name_or_path=source)
    files = sorted(file.name for file in path.iterdir())
    gguf = [name for name in files if name.endswith(".gguf")]
    if "config.json" not in files and gguf:
        if len(gguf) > 1:
            raise ValueError(f"{source}: holds {len(gguf)} .gguf files; name one of them, such as {path / gguf[0]}")
        return dict(pretrained_model_name_or_path=source, gguf_file=gguf[0])
    if "adapter_config.json" in files:
        raise ValueError(f"{path / 'adapter_config.json'}: is an adapter; merge it into its model and save that")
    if "config.json" not in files:
        raise ValueError(
            f"{path / 'config.json'}: is not there; name a folder that transformers' save_pretrained wrote"
        )
    if not any(name.endswith(".safetensors") for name in files):
        if pickles := [name for name in files if name.endswith(PICKLES)]:
            raise ValueError(
                f"{path / pickles[0]}: is a pickle, which can run code when it is read; save the model as safetensors "
                "(save_pretrained) where you trust it"
            )
        raise ValueError(f"{source}: holds no *.safetensors")
    return dict(pretrained_model_name_or_path=source)


def _reason(error: BaseException, source: str | Path) -> str:
    """What transformers' error means here, in one line."""
    text = " ".join(str(error).split()).removeprefix(f"{source}: ")
    if "trust_remote_code" in text:
        return "config.json (auto_map): the model comes with code of its own, which is not run; take one that transformers has"
    if "model type" in text and "does not recognize" in text:
        return "config.json (model_type): the installed transformers has no such model; install a newer one"
    if isinstance(error, ImportError):
        return f"transformers lacks a package for it: {text[:300]}"
    if "safetensors" in text and isinstance(error, OSError):
        return f"has no safetensors, and pickles are not read: {text[:300]}"
    return text[:400] or type(error).__name__


def _does_not_fit(info: Mapping[str, Any]) -> str | None:
    """What is missing from the weights, or is more than the model; None if nothing."""
    for kind, meaning in (
        ("missing_keys", "lacks tensors of the model that config.json describes, which would be random"),
        ("unexpected_keys", "has tensors that the model that config.json describes does not have"),
        ("mismatched_keys", "has tensors of another shape than config.json says"),
    ):
        if names := sorted(str(name) for name in info.get(kind) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{meaning}: {names[0]}{more}; take the config.json that belongs to these weights"
    if errors := info.get("error_msgs"):
        return " ".join(str(errors[0]).split())[:400]
    return None


def _mesh(groups: Groups) -> Any:
    """The ranks that share a model, as transformers wants them named."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (groups.dp.size(), groups.tp.size())
    return init_device_mesh(groups.device.type, shape, mesh_dim_names=("dp", "tp"))["tp"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, transformers draws no bars and prints no warnings: what matters is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
