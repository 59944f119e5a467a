"""A transformers model, empty at first, filled from a checkpoint's weights as they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moequant.checkpoint import Checkpoint, load
from moequant.errors import CheckpointError, foreign
from moequant.families import Config
from moequant.forward.causal import causal_class
from moequant.forward.dispatch import dispatch_all
from moequant.forward.experts import EXPERTS, part, register
from moequant.values import Weight
from moequant.values.ops import apply, put, shape_after

Provider = Callable[[Weight], Tensor]
"""A weight's values, shape `weight.shape`."""

AT_ONCE = 1 << 26
"""Weights that are decoded at a time where a provider knows parts: enough that compiled kernels pay."""


def build_model(
    checkpoint: Checkpoint,
    experts: str = EXPERTS,
    provider: Provider = load,
    dtype: torch.dtype = torch.float32,
) -> transformers.PreTrainedModel:
    """The checkpoint's whole model in evaluation mode with weights from `provider`.

    `experts` names the registered experts implementation that runs the MoE blocks, see
    `forward.experts`. Raises CheckpointError when transformers expects another shape.
    """
    model = empty_model(checkpoint, experts)
    fill(model, checkpoint.weights, provider, dtype)
    if checkpoint.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def empty_model(
    checkpoint: Checkpoint, experts: str = EXPERTS, device: str | torch.device = "cpu"
) -> transformers.PreTrainedModel:
    """The model without memory for its weights: parameters are on the meta device, buffers on `device`.

    Raises CheckpointError for a weight of another shape than the model's, and when a parameter or a buffer
    that checkpoints hold would be filled by nothing.
    """
    model = _without_memory(checkpoint.path, checkpoint.config, experts)
    _check_filled(checkpoint, model)
    # Buffers are computed from the config by transformers' own initialisation, which meta tensors skipped.
    with foreign(CheckpointError, f"{checkpoint.path}: {_UNFIT}"):
        for module in model.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
                model._init_weights(module)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.numel():  # what has no number is complete
                    _set(module, name, torch.empty_like(parameter, device=device))
    made: transformers.PreTrainedModel = model.eval().requires_grad_(False)
    return made


_UNFIT = "transformers cannot build the model that config.json describes"


class _Undrawn(TorchFunctionMode):
    """Inside the block torch's layers draw no numbers for their weights: on the meta device there is no place
    for them, and asking for them was more than half of what making a model took."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What is called, unless it draws."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _without_memory(path: Path, config: Config, experts: str = EXPERTS) -> transformers.PreTrainedModel:
    """The model of a config, everything in it on the meta device."""
    register()
    cls = causal_class(config)
    with foreign(CheckpointError, f"{path}: {_UNFIT}"), torch.device("meta"), _Undrawn():
        model: transformers.PreTrainedModel = cls._from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            # torch's attention kernels, unless the class has terms that they do not know, such as sinks.
            attn_implementation="sdpa" if cls._supports_sdpa else "eager",
            experts_implementation=experts,
        )
        dispatch_all(model)
    return model


def shapes(path: Path, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of what checkpoints hold for a model, by the names of its parameters and buffers; `path` is
    what an error calls it. CheckpointError for a config that makes no model."""
    return _shapes(_without_memory(path, config))


def _shapes(model: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    return found | {name: tuple(one.shape) for name, one in model.named_buffers() if _is_stored(model, name)}


def fill(
    model: nn.Module,
    weights: Iterable[Weight],
    provider: Provider = load,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Give the parameters and buffers of `weights` memory on `device` and their values.

    `dtype` None keeps experts as they are stored (the experts function widens one at a
    time) and everything else in float32.
    """
    for weight in _placed(weights):
        module, leaf = _owner(model, weight.place.param)
        target, values = getattr(module, leaf), provider(weight)
        wanted = dtype or (values.dtype if weight.is_expert else torch.float32)
        if target.is_meta:
            target = _set(module, leaf, torch.empty_like(target, dtype=wanted, device=device))
        put(weight.place.ops, target.data, values)


def release(model: nn.Module, weights: Iterable[Weight]) -> None:
    """Take the memory of these weights' parameters back."""
    for name in {weight.place.param for weight in _placed(weights)}:
        module, leaf = _owner(model, name)
        target = getattr(module, leaf)
        if isinstance(target, nn.Parameter) and not target.is_meta:
            _set(module, leaf, torch.empty_like(target, device="meta"))


def held(model: nn.Module, name: str) -> Tensor:
    """The values of a parameter or a buffer."""
    return _target(model, name).data


def own_buffers(model: nn.Module, weights: Iterable[Weight]) -> None:
    """Give the buffers of these weights memory of their own: whoever has them keeps what they held."""
    for name in {weight.place.param for weight in _placed(weights)}:
        module, leaf = _owner(model, name)
        target = getattr(module, leaf)
        if not isinstance(target, nn.Parameter):
            _set(module, leaf, target.clone())


def replace_memory(model: nn.Module, name: str, keep: bool) -> None:
    """Give a parameter memory of its own in float32, its values copied with `keep`: modules that share the
    old one keep that."""
    old = _target(model, name)
    new = old.to(torch.float32, copy=True) if keep else torch.empty_like(old, dtype=torch.float32)
    _assign(model, name, new)


def changed(model: nn.Module, weights: Iterable[Weight], provider: Provider) -> dict[str, Tensor]:
    """The parameters in which these weights have other values, in float32; see `using`.

    The provider is asked for some experts at a time (`Weight.of`).
    """
    found: dict[str, Tensor] = {}
    for weight in weights:
        name = weight.place.param
        old = held(model, name)
        if not weight.place.ops and not weight.is_expert:  # a head is gigabytes, and not copied
            found[name] = provider(weight).to(old.device, torch.float32)
            continue
        if name not in found:
            found[name] = old.to(torch.float32, copy=True)
        for at, some in weight.some(AT_ONCE):
            put(weight.place.ops, found[name][at], provider(some))
    return found


@contextmanager
def using(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block parameters and buffers of the model, by their names, are these."""
    before = {name: held(model, name) for name in values}
    try:
        for name, new in values.items():
            _assign(model, name, new)
        yield
    finally:
        for name, old in before.items():
            _assign(model, name, old)


def some_experts(
    module: nn.Module,
    weights: Iterable[Weight],
    experts: range,
    provider: Provider,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A module of experts with these alone, numbered from 0: of `weights` their values, as they are stored;
    the rest is the memory of `module`."""
    made = part(module, experts)
    for weight in weights:
        leaf, values = _leaf(weight), provider(weight.of(experts))
        whole = getattr(made, leaf)
        if whole.is_meta:
            empty = torch.empty_like(whole, dtype=values.dtype, device=device)
            whole = nn.Parameter(empty, requires_grad=False)
            setattr(made, leaf, whole)
        put(weight.place.ops, whole.data, values)
    return made


def changed_experts(module: nn.Module, weights: Sequence[Weight], provider: Provider) -> nn.Module:
    """A copy of a module of experts in which weights have other values, of all experts that it has, in
    float32; what does not change is shared, and what changes as a whole is not copied before."""
    made = part(module, range(int(module.num_experts)))  # type: ignore[arg-type]
    sizes: dict[str, int] = {}
    for weight in weights:
        sizes[_leaf(weight)] = sizes.get(_leaf(weight), 0) + weight.numel
    for leaf, size in sizes.items():
        old = getattr(made, leaf).data
        whole = size == old.numel()
        new = torch.empty_like(old, dtype=torch.float32) if whole else old.to(torch.float32, copy=True)
        setattr(made, leaf, nn.Parameter(new, requires_grad=False))
    for weight in weights:
        put(weight.place.ops, getattr(made, _leaf(weight)).data, provider(weight))
    return made


def of_experts(module: nn.Module, weight: Weight) -> Tensor:
    """The values [E, out, in] of a weight in a module that has some of its experts."""
    return apply(weight.place.ops, getattr(module, _leaf(weight)).data)


def _leaf(weight: Weight) -> str:
    """What the module that has the weight's parameter calls it."""
    return weight.place.param.rpartition(".")[2]


def _placed(weights: Iterable[Weight]) -> list[Weight]:
    """Those that live in the model; a file may hold tensors that the model computes."""
    return [weight for weight in weights if weight.runs]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter or a buffer, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _target(model: nn.Module, name: str) -> Tensor:
    found: Tensor = getattr(*_owner(model, name))
    return found


def _assign(model: nn.Module, name: str, values: Tensor) -> Tensor:
    return _set(*_owner(model, name), values)


def _set(module: nn.Module, leaf: str, values: Tensor) -> Tensor:
    """The module's parameter or buffer, which is these values now."""
    is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
    new = nn.Parameter(values, requires_grad=False) if is_parameter else values
    setattr(module, leaf, new)
    return new


def _check_filled(checkpoint: Checkpoint, model: transformers.PreTrainedModel) -> None:
    """Every parameter and stored buffer will have its values, every weight its place and its shape."""
    there = _shapes(model)
    for weight in _placed(checkpoint.weights):
        shape = there.get(weight.place.param)
        if shape is None:
            raise CheckpointError(
                f"{weight.name}: transformers' {type(model).__name__} has no {weight.place.param}"
            )
        try:
            expected = shape_after(weight.place.ops, shape)
        except ValueError as error:
            raise CheckpointError(f"{weight.name}: config.json asks for {list(shape)}; {error}") from None
        if expected != weight.shape:
            raise CheckpointError(
                f"{weight.name}: shape {list(weight.shape)} does not fit config.json, which asks for "
                f"{list(expected)}"
            )
    filled = {weight.place.param for weight in checkpoint.weights}
    filled |= set(checkpoint.family.constants(checkpoint.config))
    if checkpoint.tied:
        filled.add("lm_head.weight")
    if empty := sorted(name for name, shape in there.items() if name not in filled and 0 not in shape):
        raise CheckpointError(
            f"{type(model).__name__}: nothing in the checkpoint fills {', '.join(empty[:3])}"
        )


def _is_stored(model: nn.Module, name: str) -> bool:
    """Whether checkpoints hold a buffer: it is no number that the model computes from its config."""
    module, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(module)._non_persistent_buffers_set
