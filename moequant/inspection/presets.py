"""The file that each preset would give, as the header it would have: exact, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moequant import families
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.containers.gguf import write as gguf
from moequant.containers.gguf.header import Header, TensorInfo
from moequant.containers.gguf.presets import BASE_TYPES, ModelFacts
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec, read_tokenizer
from moequant.plan import ALIGNMENT, preset_plan
from moequant.values import Plan

_FLOATS = {"F32": "F32", "BF16": "BF16", "F16": "F16"}


@dataclass(frozen=True, slots=True)
class PresetFile:
    """What `--type name` gives: the file's header, and the KL divergence that its plan expects, if known."""

    name: str
    header: Header
    damage: float | None


def preset_files(folder: Path) -> Iterator[PresetFile]:
    """The file of every preset of a folder that moequant converts. Raises what opening the folder raises."""
    return files_of(open_checkpoint(folder), read_tokenizer(folder))


def files_of(checkpoint: Checkpoint, tokenizer: TokenizerSpec) -> Iterator[PresetFile]:
    """The file of every preset, in the order of the presets; floats only in the checkpoint's own type.

    The keys of the file are as long for one preset as for another, so its header is laid out once.
    """
    arch = checkpoint.family.gguf_arch
    metadata = {key: value for key, _, value in families.metadata(checkpoint.family, checkpoint.config)}
    shapes = {weight.name: weight.shape for weight in checkpoint.weights}
    own = source_type(checkpoint)
    fixed: int | None = None
    for preset in BASE_TYPES:
        if _FLOATS.get(preset, own) != own:
            continue
        plan = preset_plan(checkpoint.weights, preset, model_facts(checkpoint))
        data = _aligned_bytes(plan)
        if fixed is None:
            fixed = gguf.file_bytes(checkpoint, tokenizer, plan, gguf_provenance()) - data
        tensors = tuple(TensorInfo(c.weight, c.format, shapes[c.weight], c.bytes) for c in plan.choices)
        header = Header(checkpoint.path, {"general.architecture": arch, **metadata}, tensors, fixed + data)
        yield PresetFile(preset, header, plan.damage)


def source_type(checkpoint: Checkpoint) -> str:
    """The number type of most of the checkpoint's bytes, as safetensors calls it."""
    sizes: dict[str, int] = {}
    for weight in checkpoint.weights:
        for source in weight.sources:
            sizes[source.ref.dtype] = sizes.get(source.ref.dtype, 0) + source.ref.end - source.ref.begin
    return max(sizes, key=lambda name: sizes[name])


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """What llama.cpp's type rules look at."""
    config = checkpoint.config
    gqa = int(config["num_attention_heads"]) // int(config["num_key_value_heads"])
    return ModelFacts(checkpoint.n_layers, checkpoint.n_experts, gqa, checkpoint.tied)


def gguf_provenance() -> dict[str, str]:
    """The keys that `convert` adds about itself."""
    from moequant import __version__

    return {"general.quantized_by": f"moequant {__version__}"}


def _aligned_bytes(plan: Plan) -> int:
    return sum(-(-choice.bytes // ALIGNMENT) * ALIGNMENT for choice in plan.choices)
