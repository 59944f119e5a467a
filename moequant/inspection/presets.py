"""The file that each preset would give, as the header it would have: exact, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.checkpoint import Folder
from moequant.containers.gguf import write as gguf
from moequant.containers.gguf.container import provenance
from moequant.containers.gguf.export import Exported, export
from moequant.containers.gguf.header import Header, TensorInfo
from moequant.containers.gguf.presets import BASE_TYPES, facts
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec, read_tokenizer
from moequant.containers.opened import open_model
from moequant.errors import PlanError
from moequant.inspection.values import PresetFile
from moequant.plan import ALIGNMENT, preset_plan
from moequant.runtimes.llama_cpp import acceptance
from moequant.values import Plan, Role

_FLOATS = {"F32": "F32", "BF16": "BF16", "F16": "F16"}


def preset_files(folder: Folder) -> Iterator[PresetFile]:
    """The file of every preset of a folder that moequant converts. Raises what opening the folder raises."""
    return files_of(export(open_model(folder)), read_tokenizer(folder.path))


def files_of(exported: Exported, tokenizer: TokenizerSpec) -> Iterator[PresetFile]:
    """The file of every preset, in the order of the presets; floats only where the checkpoint is in them: of
    one that is quantized they would hold the same numbers in many times the bytes.

    The keys of the file are as long for one preset as for another, so its header is laid out once. Presets
    that are smaller than any file of the model are left out; PlanError where all are.
    """
    metadata = {"general.architecture": exported.arch, **exported.metadata}
    own, made = source_type(exported), provenance(exported.checkpoint)
    fixed: int | None = None
    small: PlanError | None = None
    for preset in BASE_TYPES:
        if _FLOATS.get(preset, own) != own:
            continue
        try:
            plan = preset_plan(exported.weights, preset, facts(exported))
        except PlanError as error:
            small = error
            continue
        data = _aligned_bytes(plan)
        if fixed is None:
            (whole,) = gguf.part_bytes(gguf.Content(exported, tokenizer, made), plan)
            fixed = whole - data
        tensors = tuple(
            TensorInfo(exported.names[c.weight], c.format, exported.shapes[c.weight], c.bytes)
            for c in plan.choices
        )
        header = Header(exported.checkpoint.path, metadata, tensors, fixed + data)
        yield PresetFile(preset, header, plan.kl)
    if fixed is None and small is not None:
        raise small


def check_runtime(exported: Exported, tokenizer: TokenizerSpec) -> None:
    """LlamaError when llama.cpp, where it is here, refuses files of the model, as `convert` finds out too."""
    checkpoint = exported.checkpoint
    content = gguf.Content(exported, tokenizer, provenance(checkpoint))
    plan = preset_plan(exported.weights, "Q4_K_M", facts(exported))
    acceptance.check(lambda header: gguf.outline(header, content, plan), str(checkpoint.source))


def source_type(exported: Exported) -> str:
    """How most of the model's numbers are stored: a type of floats as safetensors calls it, or a codec."""
    counts: dict[str, int] = {}
    for weight in exported.weights:
        if weight.role is Role.TABLE:
            continue
        codec = weight.origin.stored[0].codec.name
        stored = weight.origin.dtype if codec == "plain" else codec
        counts[stored] = counts.get(stored, 0) + weight.numel
    return max(counts, key=lambda name: counts[name])


def _aligned_bytes(plan: Plan) -> int:
    return sum(-(-choice.bytes // ALIGNMENT) * ALIGNMENT for choice in plan.choices)
