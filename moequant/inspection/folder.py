"""A Hugging Face folder from config.json and safetensors headers, of any family, supported or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from moequant import families
from moequant.checkpoint import Checkpoint, Folder
from moequant.checkpoint.codecs import recognise
from moequant.checkpoint.headers import read_header, read_headers
from moequant.checkpoint.open import every_slot, method_of, quantization_of, renamed, shape_of
from moequant.containers.gguf.export import check, export
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec, read_tokenizer
from moequant.containers.opened import open_model
from moequant.errors import CheckpointError, FamilyError, MoequantError, TokenizerError, few
from moequant.families.config import HARMLESS, make_config, text_config
from moequant.files.read import read_json
from moequant.inspection import presets
from moequant.inspection.runtimes import checkpoint_runtimes
from moequant.inspection.values import Counted, Inspection, PresetSize, by_role, by_type
from moequant.values import ModelShape, Stored, TensorRef

_ROLES = (
    ("next token", r"(model\.)?mtp\b"),
    ("streams", r"(.*\.)?(hc_|attn_hc\b|ffn_hc\b)"),
    ("scales", r".*(_scale|[._]scales|scale_inv|zero_point|qzeros|g_idx|weight_shape|_scale_2|input_scale)$"),
    ("vision", r".*(visual|vision|mm_projector|multi_modal|audio)"),
    ("embedding", r"(.*(embed_tokens|wte|word_embeddings|ngram_embedding)|shared|embed)\b"),
    ("output", r"((.*\.)?(lm_head|embed_out)|head)\b"),
    ("shared expert", r".*shared_(expert|mlp)"),
    ("router", r".*((mlp|block_sparse_moe|feed_forward|ffn|mixer|moe)\.(gate|router)|router)\b"),
    ("expert gate+up", r".*(experts\.gate_up_proj|experts\.\d+\.gate_up_proj|input_linear)"),
    ("expert gate", r".*experts\.(\d+\.)?(mlp\.)?(gate_proj|w1)\b"),
    ("expert up", r".*experts\.((\d+\.)?(mlp\.)?(up_proj|w3|v1)|expert_\d+\.wi)\b"),
    ("expert down", r".*(experts\.((\d+\.)?(mlp\.)?(down_proj|w2)|expert_\d+\.wo)|output_linear)"),
    ("expert other", r".*\.experts\."),
    ("norm", r".*(norm|layernorm|ln_\w)\b"),
    ("attention", r".*(attn|[aA]ttention)"),
    ("recurrent", r".*(mamba|linear_attn|ssm|conv)"),
    ("dense ffn", r".*(mlp|feed_forward|ffn)\b"),
)
ORDER = (*(role for role, _ in _ROLES), "other")

_KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "used": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k",
             "moe_top_k", "top_k_experts"),
    "shared": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "context": ("max_position_embeddings", "max_seq_len", "n_positions"),
}  # fmt: skip
"""What families call the same thing in config.json."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    type: str
    bytes: int
    parameters: int
    role: str


def inspect_folder(folder: Folder) -> Inspection:
    """Describe a model folder. Raises CheckpointError without readable config and safetensors files."""
    path = folder.path
    config = read_json(path / "config.json")
    weights = _weights(folder, config)
    tensors = _headers(folder, weights)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    facts = {name: _first(keys, config, text or {}) for name, keys in _KEYS.items()}
    named = [name for name, each in weights.items() if 0 not in each.shape]
    names = named or [tensor.name for tensor in tensors]
    support = _support(folder, config, names)
    if (known := support.shape) is not None:
        facts |= {"layers": known.layers, "experts": known.experts, "used": known.experts_used}
    experts, used = facts["experts"] or _seen_experts(tensors), facts["used"] or None
    share = used / experts if experts and used else 1.0
    tied = not any(tensor.role == "output" for tensor in tensors)
    counted = [_counted(tensor, share, tied, facts["layers"]) for tensor in tensors]
    architecture = (families.architectures(config) or ["(none in config.json)"])[0]
    shared = facts["shared"] or (1 if any("shared_expert." in tensor.name for tensor in tensors) else None)
    return Inspection(
        path=path,
        kind="checkpoint",
        architecture=architecture,
        family=support.family,
        layers=facts["layers"],
        experts=experts,
        experts_per_token=used,
        shared_experts=shared,
        context=facts["context"],
        parameters=sum(tensor.parameters for tensor in counted),
        active=round(sum(tensor.parameters * tensor.share for tensor in counted)),
        bytes=sum(tensor.bytes for tensor in counted),
        active_bytes=round(sum(tensor.bytes * tensor.share for tensor in counted if tensor.read)),
        file_bytes=sum(file.bytes for file in folder.weights.values()),
        types=by_type(counted),
        roles=by_role(counted, ORDER),
        tokenizer=support.tokenizer,
        made_by=method_of(path, config),
        presets=support.presets,
        missing=support.missing,
        notes=support.notes,
        runtimes=checkpoint_runtimes(architecture, str(config.get("model_type", "")), not support.missing),
    )


def role_of(name: str) -> str:
    """What a tensor of that name does, in any family; `other` when its name does not tell."""
    return next((role for role, pattern in _ROLES if re.match(pattern, name)), "other")


def _weights(folder: Folder, config: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors as the numbers that they hold, quantized ones by the names that they have in bf16. Empty
    where that cannot be told, which opening the model explains."""
    try:
        return recognise(read_headers(folder), quantization_of(folder.path, config))
    except MoequantError:
        return {}


def _headers(folder: Folder, weights: Mapping[str, Stored]) -> list[_Tensor]:
    """Every tensor of the model's files, whether an index names it or not. Of a quantized weight the
    codes stand for all its numbers, and what lies beside them for none."""
    if not folder.weights:
        raise CheckpointError(f"{folder.path}: no *.safetensors file; other weight formats are not read")
    refs = (ref for _, file in sorted(folder.weights.items()) for ref in read_header(file))
    codes, beside = dict[str, int](), set[str]()
    for weight in weights.values():
        for part, ref in weight.parts.items():
            if part in ("", "weight"):
                codes[ref.name] = prod(weight.shape)
            else:
                beside.add(ref.name)
    made = []
    for ref in refs:
        role = role_of(ref.name)
        if ref.name in beside and role != "next token":
            role = "scales"
        count = 0 if ref.name in beside else codes.get(ref.name, _guess(ref, role))
        made.append(_Tensor(ref.name, ref.dtype, ref.end - ref.begin, count, role))
    return made


def _counted(tensor: _Tensor, share: float, tied: bool, layers: int | None) -> Counted:
    role = tensor.role
    beyond = re.match(r"(?:model\.)?layers\.(\d+)\.", tensor.name)
    if role == "next token" or (beyond and layers and int(beyond[1]) >= layers):
        # Layers that guess the token after the next one are not run in plain decoding.
        return Counted("next token", tensor.type, tensor.parameters, tensor.bytes, 0.0)
    routed = ".experts" in tensor.name or role in ("expert gate+up", "expert down")
    active = share if routed and not role.startswith("shared") else 1.0
    return Counted(role, tensor.type, tensor.parameters, tensor.bytes, active, role != "embedding" or tied)


def _guess(ref: TensorRef, role: str) -> int:
    """Weights that a tensor of a form that is not read stands for: packed codes hold several a number,
    scales none."""
    if role == "scales":
        return 0
    packed = {"_blocks": 4, "qweight": 4, "weight_packed": 4}
    for suffix, bits in packed.items():
        # 4 bits is what MXFP4 has, and what nearly all GPTQ and AWQ checkpoints have.
        if ref.name.endswith(suffix):
            return (ref.end - ref.begin) * 8 // bits
    return prod(ref.shape)


def _first(keys: tuple[str, ...], *configs: Mapping[str, Any]) -> int | None:
    """The first of the keys that one of the configs has: a count, or the largest of a list."""
    for config in configs:
        for key in keys:
            value = config.get(key)
            counts = value if isinstance(value, list) else [value]
            if counts and all(_is_count(each) for each in counts):
                return int(max(counts))
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32


def _seen_experts(tensors: list[_Tensor]) -> int | None:
    """Experts counted by their tensors' names, for a config that does not say."""
    numbers = [int(found[1]) for t in tensors if (found := re.search(r"\.experts\.(\d+)\.", t.name))]
    return max(numbers) + 1 if numbers else None


@dataclass(frozen=True, slots=True)
class _Support:
    family: str | None
    shape: ModelShape | None
    tokenizer: str
    presets: tuple[PresetSize, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def _support(folder: Folder, config: Mapping[str, Any], names: list[str]) -> _Support:
    """Everything that keeps `moequant convert` from this folder; its sizes when nothing does."""
    missing: list[str] = []
    family: families.Family | None = None
    shape: ModelShape | None = None
    checkpoint: Checkpoint | None = None
    tokenizer: TokenizerSpec | None = None
    sizes: tuple[PresetSize, ...] = ()
    try:
        family = families.find(config)
        text = make_config(family, config)
        shape = shape_of(family, text)
        if unknown := _unknown(family, text, names):
            missing.append(f"{family.name}: unknown tensors: {few(unknown)}")
        check(family, text)
    except FamilyError as error:
        missing.append(str(error))
        architecture = (families.architectures(config) or [""])[0]
        if family is None and (near := families.nearest(architecture)):
            missing += _differences(near, config, names)
    if not missing:
        try:
            checkpoint = open_model(folder)
        except MoequantError as error:
            missing.append(str(error))
    try:
        tokenizer = read_tokenizer(folder.path)
    except TokenizerError as error:
        missing.append(str(error))
    if checkpoint is not None:
        try:
            exported = export(checkpoint)
            if tokenizer is not None:
                presets.check_runtime(exported, tokenizer)
                sizes = tuple(
                    PresetSize(made.name, made.header.file_bytes, made.header.bits, made.kl)
                    for made in presets.files_of(exported, tokenizer)
                )
        except MoequantError as error:
            missing.append(str(error))
    return _Support(
        family.name if family else None,
        shape,
        _describe(tokenizer),
        sizes,
        tuple(dict.fromkeys(missing)),
        (*(tokenizer.notes if tokenizer else ()), *(checkpoint.notes if checkpoint else ())),
    )


def _unknown(family: families.Family, config: families.Config, tensors: list[str]) -> list[str]:
    """Kinds of tensors that no slot of the family names, numbers replaced by `*`."""
    slots = every_slot(family, config, family.shape(config))
    known = {_kind(name) for _, slot in slots for way in slot.ways for name in (way.name, *way.below)}
    known |= {_kind(name) for name in family.constants(config)}
    known.add("lm_head.weight")  # of a tied model it may be there, equal to the embedding
    skipped = [re.compile(pattern) for pattern in family.skipped(config)]
    names = (renamed(family, name) for name in tensors)
    left = (name for name in names if not any(pattern.fullmatch(name) for pattern in skipped))
    return sorted({_kind(name) for name in left} - known)


def _differences(near: families.Family, config: Mapping[str, Any], tensors: list[str]) -> list[str]:
    """What a model has that the nearest family does not, two lines at most."""
    found = []
    text = text_config(config)
    known = near.known | HARMLESS | near.says.keys()
    if keys := sorted(key for key in text if key not in known and text[key] is not None):
        found.append(f"config keys that {near.name} has not: {few(keys)}")
    try:
        understood = {key: text[key] for key in text if key in near.known or key in near.says}
        unknown = _unknown(near, make_config(near, {**understood, "model_type": near.model_type}), tensors)
    except (FamilyError, AttributeError, TypeError, ValueError):
        kinds = sorted({_kind(name) for name in tensors})
        return [*found, f"its tensors: {few(kinds)}"]
    if unknown:
        found.append(f"tensors that {near.name} has not: {few(unknown)}")
    return found


def _kind(name: str) -> str:
    """A tensor's name without its numbers."""
    return re.sub(r"(?<=[._])(\d+|\{e\})(?=\.)", "*", name)


def _describe(tokenizer: TokenizerSpec | None) -> str:
    if tokenizer is None:
        return "cannot be written as GGUF, see below"
    template = "with" if tokenizer.chat_templates else "without"
    return (
        f"{tokenizer.model}, pre-tokenizer {tokenizer.pre}, {len(tokenizer.tokens):,} tokens, {template} "
        "chat template"
    )
