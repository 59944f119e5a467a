"""A Hugging Face model folder, read lazily: headers first, then one weight at a time.

The one place that knows how tensors lie in files and the one place where experts are
stacked. A weight's bytes are read once, straight into the tensor that is handed out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moequant import families
from moequant.errors import CheckpointError, FamilyError
from moequant.families import Family, Part, Rule
from moequant.values import Role, Source, TensorRef, Weight

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER = 100_000_000
"""The safetensors format's own limit on its JSON header, in bytes."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model: only headers are in memory. `weights` are in the order of the output file."""

    path: Path
    config: dict[str, Any]
    family: Family
    weights: tuple[Weight, ...]
    tied: bool

    @property
    def source_bytes(self) -> int:
        """Bytes of weight data in the checkpoint's own precision."""
        refs = {source.ref.name: source.ref for weight in self.weights for source in weight.sources}
        return sum(ref.end - ref.begin for ref in refs.values())

    @property
    def n_experts(self) -> int:
        """Experts per layer, 0 for a dense model."""
        return int(self.config[self.family.experts_key]) if self.family.experts_key else 0

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return int(self.config["num_hidden_layers"])


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config and headers of a model folder.

    Raises CheckpointError for a missing, truncated or unreadable file and FamilyError for
    an architecture, a config key or a tensor that no family describes.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give a Hugging Face model folder")
    if not path.is_dir() or not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: not a Hugging Face model folder (config.json and *.safetensors expected)"
        )
    raw = _read_json(path / "config.json")
    if "quantization_config" in raw:
        raise CheckpointError(
            f"{path}: already quantized ({raw['quantization_config'].get('quant_method', 'unknown')}); "
            "give the bf16, f16 or f32 checkpoint"
        )
    family = families.find(raw)
    config = families.normalized(family, raw)
    refs = _read_headers(path)
    tied = "lm_head.weight" not in refs
    if tied and not config.get("tie_word_embeddings", False):
        raise CheckpointError(f"{path}: lm_head.weight is missing and tie_word_embeddings is not set")
    if not tied and config.get("tie_word_embeddings", False):
        # transformers uses the embedding for both, whatever the file holds.
        del refs["lm_head.weight"]
        tied = True
    weights = _assemble(family, config, refs)
    embedding = next(weight for weight in weights if weight.role is Role.EMBEDDING)
    if embedding.shape != (config["vocab_size"], config["hidden_size"]):
        raise CheckpointError(
            f"{path}: the embedding is {list(embedding.shape)}, config.json says "
            f"{[config['vocab_size'], config['hidden_size']]} (vocab_size, hidden_size)"
        )
    if tied:
        weights = tuple(
            replace(weight, input="model.norm:out") if weight.role is Role.EMBEDDING else weight
            for weight in weights
        )
    return Checkpoint(path, config, family, weights, tied)


def load(weight: Weight) -> Tensor:
    """A weight's values in the checkpoint's dtype, shape `weight.shape`, rows in llama.cpp's order."""
    dtype = _DTYPES[weight.sources[0].ref.dtype]
    out = torch.empty(weight.shape, dtype=dtype)
    if len(weight.sources[0].ref.shape) == 3:
        _read_fused(weight.sources[0], out)
    elif len(weight.shape) == 3:
        _read_stacked(weight.sources, out)
    else:
        (source,) = weight.sources
        with source.ref.file.open("rb", buffering=0) as file:
            _read_into(file, source.ref, 0, out)
    return _interleave(out, weight.rope_heads) if weight.rope_heads else out


def not_finite(weight: Weight, values: Tensor) -> str | None:
    """Which stored tensor of a loaded weight holds NaN or infinity, and how many; None when none does."""
    if torch.isfinite(values).all():
        return None
    parts = values if len(weight.sources) > 1 else values[None]
    bad = (~torch.isfinite(parts)).flatten(1).sum(1)
    first = int(bad.nonzero()[0])
    return (
        f"tensor {weight.sources[first].ref.name} ({weight.name}): {int(bad[first])} of "
        f"{parts[first].numel()} values are NaN or infinite; the checkpoint is damaged"
    )


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from transformers' rotary halves to llama.cpp's pairs: [out, in] -> [out, in]."""
    out, n_in = weight.shape
    return weight.view(heads, 2, out // heads // 2, n_in).transpose(1, 2).reshape(out, n_in)


def uninterleave(weight: Tensor, heads: int) -> Tensor:
    """The inverse of the row order that `load` gives rotary weights: [out, in] -> [out, in]."""
    out, n_in = weight.shape
    return weight.view(heads, out // heads // 2, 2, n_in).transpose(1, 2).reshape(out, n_in)


def _read_stacked(sources: tuple[Source, ...], out: Tensor) -> None:
    """Each expert's tensor into its slice of out [E, rows, in], keeping one file open at a time."""
    file: BinaryIO | None = None
    opened: Path | None = None
    try:
        for expert, source in enumerate(sources):
            if source.ref.file != opened:
                if file is not None:
                    file.close()
                file, opened = source.ref.file.open("rb", buffering=0), source.ref.file
            assert file is not None
            _read_into(file, source.ref, 0, out[expert])
    finally:
        if file is not None:
            file.close()


def _read_fused(source: Source, out: Tensor) -> None:
    """Rows start:stop of every expert of a stored [E, rows, in] tensor into out [E, stop - start, in]."""
    rows, n_in = source.ref.shape[1:]
    row_bytes = n_in * out.element_size()
    with source.ref.file.open("rb", buffering=0) as file:
        for expert in range(out.shape[0]):
            _read_into(file, source.ref, (expert * rows + source.start) * row_bytes, out[expert])


def _read_into(file: BinaryIO, ref: TensorRef, offset: int, out: Tensor) -> None:
    view = out.view(torch.uint8).reshape(-1).numpy().data
    file.seek(ref.begin + offset)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{ref.file}: ends inside tensor {ref.name}; is the download complete?")
        view = view[count:]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return value


def _read_headers(folder: Path) -> dict[str, TensorRef]:
    """All tensors of a folder by name, the index checked against the shards."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map: dict[str, str] = _read_json(index_path).get("weight_map", {})
        shards = sorted(set(weight_map.values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} named in "
                f"{index_path.name}); is the download complete?"
            )
    else:
        weight_map = {}
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{folder}: no *.safetensors file; other weight formats are not read")
    refs: dict[str, TensorRef] = {}
    for name in shards:
        for ref in _read_header(folder / name):
            if ref.name in refs:
                raise CheckpointError(
                    f"{folder}: tensor {ref.name} is in two shards, {name} and {refs[ref.name].file.name}"
                )
            refs[ref.name] = ref
    if absent := sorted(weight_map.keys() - refs.keys()):
        raise CheckpointError(f"{folder}: {absent[0]} is in the index but not in {weight_map[absent[0]]}")
    return refs


def _read_header(path: Path) -> Iterable[TensorRef]:
    """The tensors of one safetensors file, its length checked against what its header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: not a complete safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: safetensors header is damaged ({error})") from error
    header.pop("__metadata__", None)
    start = 8 + length
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > size:
        raise CheckpointError(f"{path}: truncated, {size} bytes of {end}; is the download complete?")
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        yield TensorRef(name, tuple(entry["shape"]), entry["dtype"], path, start + begin, start + stop)


def _assemble(family: Family, config: dict[str, Any], refs: dict[str, TensorRef]) -> tuple[Weight, ...]:
    """Every stored tensor claimed by a rule, every rule complete, experts in order."""
    found: dict[tuple[Rule, int | None], dict[int | None, TensorRef]] = {}
    patterns = [
        (re.compile(_pattern(name)), rule)
        for rule in family.rules
        for name in {rule.param, rule.stored or rule.param}
    ]
    ignored = [re.compile(_pattern(name)) for name in family.ignored]
    for ref in refs.values():
        claims = [(rule, match) for regex, rule in patterns if (match := regex.fullmatch(ref.name))]
        if not claims and not any(regex.fullmatch(ref.name) for regex in ignored):
            raise FamilyError(
                f"{family.name}: tensor {ref.name} {list(ref.shape)} is unknown; nothing is dropped silently"
            )
        if claims and ref.dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor {ref.name} is stored as {ref.dtype}; expected "
                f"{', '.join(_DTYPES)} (convert the checkpoint first)"
            )
        for rule, match in claims:
            groups = match.groupdict()
            layer = int(groups["l"]) if "l" in groups else None
            expert = int(groups["e"]) if "e" in groups else None
            found.setdefault((rule, layer), {})[expert] = ref
    _check_complete(family, config, found)
    weights = [_weight(rule, layer, parts, config, family) for (rule, layer), parts in found.items()]
    order = {rule.gguf: position for position, rule in enumerate(family.rules)}
    # The head comes last: what it is fed is known when everything before it has been rounded.
    rank = {
        (rule.gguf, layer): (rule.role is Role.OUTPUT, layer is not None, layer or 0, order[rule.gguf])
        for rule, layer in found
    }
    keyed = zip(found, weights, strict=True)
    return tuple(weight for _, weight in sorted(keyed, key=lambda item: rank[item[0][0].gguf, item[0][1]]))


def _check_complete(
    family: Family,
    config: dict[str, Any],
    found: dict[tuple[Rule, int | None], dict[int | None, TensorRef]],
) -> None:
    layers = int(config["num_hidden_layers"])
    if beyond := [layer for _, layer in found if layer is not None and layer >= layers]:
        raise CheckpointError(f"tensors of layer {beyond[0]} exist, but config.json says {layers} layers")
    for rule in family.rules:
        if rule.gguf == "output.weight":
            continue  # may be tied, checked by open_checkpoint
        for layer in range(layers) if "{l}" in rule.param else [None]:
            if (rule, layer) not in found:
                where = f"layer {layer}: " if layer is not None else ""
                name = (rule.stored or rule.param).replace("{l}", str(layer))
                raise CheckpointError(f"{where}{rule.role} is missing ({name}); is the download complete?")


def _weight(
    rule: Rule,
    layer: int | None,
    parts: dict[int | None, TensorRef],
    config: dict[str, Any],
    family: Family,
) -> Weight:
    """One rule's tensors of one layer as a Weight, shapes checked against each other."""
    where = f"layer {layer} {rule.role}"
    experts = int(config[family.experts_key]) if family.experts_key else 0
    if None in parts:
        if len(parts) > 1:
            raise CheckpointError(f"{where}: stored both fused and per expert")
        ref = parts[None]
        if rule.role.is_expert and (len(ref.shape) != 3 or ref.shape[0] != experts):
            raise CheckpointError(
                f"{where}: {ref.name} is {list(ref.shape)}, config.json says {experts} experts"
            )
        refs: tuple[TensorRef, ...] = (ref,)
        rows = ref.shape[-2] if len(ref.shape) > 1 else 1
        start, stop = _rows(rule.part, rows)
        shape = (*ref.shape[:-2], stop - start, ref.shape[-1]) if len(ref.shape) > 1 else ref.shape
        param_rows = (start, stop)
    else:
        if gone := sorted(set(range(experts)) - {expert for expert in parts if expert is not None}):
            raise CheckpointError(f"{where}: experts {gone} of {experts} missing; is the download complete?")
        refs = tuple(parts[expert] for expert in range(experts))
        if len(parts) != experts or len({(ref.shape, ref.dtype) for ref in refs}) != 1:
            raise CheckpointError(
                f"{where}: experts differ in number, shape or dtype from config.json's {experts}"
            )
        rows = refs[0].shape[0]
        shape = (experts, *refs[0].shape)
        start, stop = 0, rows
        param_rows = {Part.WHOLE: (0, rows), Part.FIRST_HALF: (0, rows), Part.SECOND_HALF: (rows, 2 * rows)}[
            rule.part
        ]
    heads = int(config[rule.rope]) if rule.rope else 0
    return Weight(
        name=rule.gguf.replace("{l}", str(layer)),
        role=rule.role,
        layer=layer,
        shape=tuple(shape),
        sources=tuple(Source(ref, start, stop) for ref in refs),
        param=rule.param.replace("{l}", str(layer)),
        param_rows=param_rows,
        input=_input(rule, layer),
        rope_heads=heads,
    )


def _input(rule: Rule, layer: int | None) -> str | None:
    """The name under which `routing` collects the activations that a weight multiplies, if any."""
    if rule.role.keeps_precision or rule.role == "embedding":
        return None
    if rule.role.is_expert:
        side = "down" if rule.role == "down" else "up"
        return f"model.layers.{layer}.mlp.experts:{side}"
    name = rule.input or rule.param.removesuffix(".weight")
    return name.replace("{l}", str(layer))


def _rows(part: Part, rows: int) -> tuple[int, int]:
    return {Part.WHOLE: (0, rows), Part.FIRST_HALF: (0, rows // 2), Part.SECOND_HALF: (rows // 2, rows)}[part]


def _pattern(name: str) -> str:
    """A name table entry as a regex: `{l}` and `{e}` become named groups of digits."""
    return re.escape(name).replace(r"\{l\}", r"(?P<l>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
