"""FP8 post-training quantization with NVIDIA ModelOpt: calibrate a model, round its weights, run it quantized.

In: a model's chunks and forwards to calibrate on. Out: `Quantization`, the largest values of weights and inputs under
names that no layout changes, and weights rounded to what FP8 can say; later, inside `quantized`, the same model with
ModelOpt's quantizers on the inputs of its linears. Which linears is ModelOpt's recipe to say: those of attention, MLP
and experts, not router, embeddings, norms and output layer. Experts have to be Megatron-Core's own: Transformer
Engine's are one grouped product, whose weights and inputs ModelOpt could not tell apart by expert.

ModelOpt's own checkpoints pickle what they know of each module, and its quantized SequentialMLP refuses TP with EP.
Here its classes replace one linear at a time, what they find is reduced over ranks by name, and is kept as JSON.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_lccp.config.tree import Config
from megatron_lccp.model.build import bare, te_parts
from megatron_lccp.model.resolved import resolve
from megatron_lccp.parallel.gather import first_text

if TYPE_CHECKING:  # it takes seconds to import, and is an extra
    from modelopt.torch.quantization.nn import QuantModule

RECIPES = {"fp8": "FP8_DEFAULT_CFG"}
"""Our name -> ModelOpt's: E4M3 weights and inputs, one static scale a tensor, which is its largest value / 448."""


@dataclass(frozen=True)
class Quantization:
    """What a quantized model is, beside its weights."""

    recipe: str
    """Key of RECIPES."""
    modelopt: str
    """Version of ModelOpt that calibrated it."""
    weights_of: str
    """Checkpoint whose weights were rounded."""
    calibrated_on: str
    """Text of the forwards that calibrated it."""
    weight_amax: Mapping[str, float]
    """Linear, such as decoder.layers.3.mlp.experts.12.linear_fc1 -> largest absolute value of its whole weight."""
    input_amax: Mapping[str, float]
    """Linear -> the same of its input; the experts of a layer share one: decoder.layers.3.mlp.experts.linear_fc1."""

    def as_tree(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_tree(tree: Any) -> Quantization:
        """The inverse of `as_tree`. ValueError says what is wrong with it."""
        try:
            found = Quantization(**tree)
            sizes, known = [*found.weight_amax.values(), *found.input_amax.values()], found.recipe in RECIPES
        except (TypeError, AttributeError) as error:
            raise ValueError(f"quantization: is not one of tools/quantize_checkpoint.py: {error}") from error
        if not known:
            raise ValueError(f"quantization: recipe {found.recipe!r} is not known; known: {', '.join(RECIPES)}")
        if not all(isinstance(size, float) and math.isfinite(size) and size > 0 for size in sizes):
            raise ValueError("quantization: holds a largest value that is not a positive number")
        return found


def require_modelopt() -> None:
    """Raises ValueError if ModelOpt cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it was not tested with this transformers, which plays no part here
            import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        raise ValueError(f"quantization: needs nvidia-modelopt; pip install nvidia-modelopt ({error})") from error


def require_single_experts(config: Config) -> None:
    """Raises ValueError if the experts of the model would be one grouped product on this machine."""
    if te_parts(config.model)[0] and resolve(config).fields.get("num_moe_experts"):
        raise ValueError(
            "model.layers: Transformer Engine's grouped experts cannot be quantized; give --model.layers=portable"
        )


@torch.no_grad()
def quantize(
    chunks: Sequence[torch.nn.Module], recipe: str, forwards: Callable[[], None], weights_of: str, calibrated_on: str
) -> Quantization:
    """Calibrate on what `forwards()` runs through the chunks, then round their weights; every rank calls it.

    A rank takes the largest value that any rank saw, so layouts agree. Raises ValueError if ModelOpt is missing or
    does not know a linear, or if some linear saw nothing.
    """
    require_modelopt()
    import modelopt
    from modelopt.torch.quantization.model_calib import max_calibrate

    with _converted(chunks, recipe) as linears:
        max_calibrate(_together(chunks), lambda _: forwards(), distributed_sync=False)
        weight_amax = _largest((x.weight, x.module.weight_quantizer.amax) for x in linears)
        input_amax = _largest((x.input, x.module.input_quantizer.amax) for x in linears)
        silent = [name for name, size in (weight_amax | input_amax).items() if not 0 < size < math.inf]
        if silent:
            raise ValueError(f"quantization: {silent[0]} saw only zeros, or no token at all; calibrate on more text")
        for linear in linears:
            quantizer = linear.module.weight_quantizer
            quantizer.amax = torch.full_like(quantizer.amax, weight_amax[linear.weight])
            linear.module.weight.copy_(quantizer(linear.module.weight))
    return Quantization(recipe, modelopt.__version__, weights_of, calibrated_on, weight_amax, input_amax)


@contextlib.contextmanager
def quantized(chunks: Sequence[torch.nn.Module], how: Quantization | None) -> Iterator[None]:
    """While open, the linears of chunks whose weights were rounded by `quantize` round their inputs; None: no change.

    Every rank enters it. Raises ValueError if ModelOpt is missing or `how` is of another model. A token's result
    depends on no other token, for the scales are fixed: prefills can still be shared.
    """
    if how is None:
        yield
        return
    require_modelopt()
    with _converted(chunks, how.recipe) as linears:
        absent = [x.weight for x in linears if x.weight not in how.weight_amax or x.input not in how.input_amax]
        if name := first_text(absent[0] if absent else None):
            raise ValueError(f"quantization: has no scale for {name}; it belongs to another model")
        for linear in linears:
            linear.module.weight_quantizer.disable()  # rounding what was rounded changes nothing
            size = torch.tensor(how.input_amax[linear.input], device=linear.module.weight.device)
            linear.module.input_quantizer.amax = size
        yield


@dataclass(frozen=True)
class _Linear:
    """A linear of this rank and what it is called in the whole model."""

    weight: str
    input: str
    module: QuantModule
    """Megatron-Core's linear, of ModelOpt's class while it is converted."""


def _linears(chunks: Sequence[torch.nn.Module]) -> Iterator[_Linear]:
    """Megatron-Core calls them linear_qkv, linear_proj, linear_fc1, linear_fc2; those of grouped experts too."""
    for chunk in chunks:
        for layer in bare(chunk).decoder.layers:
            experts: Sequence[int] = getattr(layer.mlp, "local_expert_indices", ())
            for name, module in layer.named_modules():
                if name.rpartition(".")[2].startswith("linear_"):
                    path = f"decoder.layers.{layer.layer_number - 1}.{name}"
                    weight = re.sub(r"\.local_experts\.(\d+)", lambda m: f".{experts[int(m[1])]}", path)
                    yield _Linear(weight, re.sub(r"\.local_experts\.\d+", "", path), module)


@contextlib.contextmanager
def _converted(chunks: Sequence[torch.nn.Module], recipe: str) -> Iterator[list[_Linear]]:
    """While open, linears are of ModelOpt's classes, with the quantizers that the recipe enables; gives those.

    Names of parameters stay as they are, but a state dict taken meanwhile holds quantizers too.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer

    linears = list(_linears(chunks))
    strange = [x for x in linears if type(x.module) not in QuantModuleRegistry or not hasattr(x.module, "weight")]
    if problem := first_text(f"{strange[0].weight} is a {type(strange[0].module).__name__}" if strange else None):
        raise ValueError(f"quantization: {problem}, which cannot be quantized here")
    before = {linear.module: set(vars(linear.module)) for linear in linears}
    try:
        for linear in linears:
            QuantModuleRegistry.convert(linear.module)
        mtq.set_quantizer_by_cfg(_together(chunks), getattr(mtq, RECIPES[recipe])["quant_cfg"])
        yield [linear for linear in linears if linear.module.weight_quantizer.is_enabled]
    finally:
        for module, names in before.items():
            module.export()
            for name, child in list(module.named_children()):
                if isinstance(child, TensorQuantizer):
                    delattr(module, name)
            for name in set(vars(module)) - names:
                delattr(module, name)


def _together(chunks: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """The chunks of a rank as the one model that ModelOpt takes."""
    return torch.nn.ModuleList([bare(chunk) for chunk in chunks])


def _largest(mine: Iterator[tuple[str, torch.Tensor | None]]) -> dict[str, float]:
    """Name -> largest value over all ranks and over equal names: shards of a weight, experts of a layer."""
    here: dict[str, float] = {}
    for name, amax in mine:
        here[name] = max(here.get(name, 0.0), 0.0 if amax is None else amax.float().item())
    everyone = [here] * dist.get_world_size()
    dist.all_gather_object(everyone, here)
    return {name: max(part.get(name, 0.0) for part in everyone) for name in sorted(set().union(*everyone))}
