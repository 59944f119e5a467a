"""A GGUF file from its header: anyone's, whatever wrote it."""

from __future__ import annotations

from moequant.containers.gguf.header import Header, TensorInfo
from moequant.containers.gguf.roles import ROLES, is_embedding, is_tied, role_of
from moequant.errors import CheckpointError
from moequant.inspection.runtimes import gguf_runtimes
from moequant.inspection.values import Counted, Inspection, by_role, by_type
from moequant.runtimes.llama_cpp.kv_cache import experts_used

ORDER = (*(role for role, _ in ROLES), "other")


ALONE = (
    "the original's config.json and tokenizer are not beside the file: name their folder, moequant convert "
    "FILE --config FOLDER"
)
"""Why a file that could be converted again is not converted as it lies there."""


def inspect_gguf(header: Header) -> Inspection:
    """Describe a GGUF file, all shards of it. Raises CheckpointError for what is not a whole GGUF model."""
    path = header.path
    kind = header.text("general.type") or "model"
    if not header.arch or kind != "model":
        raise CheckpointError(f"{path}: a GGUF file of type {kind!r}, not a model; give the model's own file")
    if not header.tensors:
        raise CheckpointError(f"{path}: no tensors in it; give the file of a whole model")
    layers = header.layers
    # Blocks that guess the token after the next one are not run in plain decoding.
    running = layers - header.count("nextn_predict_layers")
    tied = is_tied(header.tensors)
    counted = [_counted(tensor, header, running, tied) for tensor in header.tensors]
    types = by_type(counted)
    return Inspection(
        path=path,
        kind="gguf",
        architecture=header.arch,
        family=None,
        layers=layers or None,
        experts=header.largest("expert_count") or None,
        experts_per_token=header.largest("expert_used_count") or None,
        shared_experts=header.largest("expert_shared_count") or _has_shared(header),
        context=header.count("context_length") or None,
        parameters=sum(tensor.parameters for tensor in counted),
        active=round(sum(tensor.parameters * tensor.share for tensor in counted)),
        bytes=sum(tensor.bytes for tensor in counted),
        active_bytes=round(sum(tensor.bytes * tensor.share for tensor in counted if tensor.read)),
        file_bytes=header.file_bytes,
        types=types,
        roles=by_role(counted, ORDER),
        tokenizer=_tokenizer(header),
        made_by=header.text("general.quantized_by"),
        presets=(),
        missing=() if (path.parent / "config.json").is_file() else (ALONE,),
        notes=_notes(header),
        runtimes=gguf_runtimes(header.arch, tuple(name for name, _ in types)),
    )


def _counted(tensor: TensorInfo, header: Header, running: int, tied: bool) -> Counted:
    role = role_of(tensor.name)
    share, layer = 1.0, tensor.layer
    if layer is not None and layer >= running:
        share = 0.0
    elif layer is not None and tensor.is_expert:
        share = experts_used(header, layer, tensor.shape[0]) / tensor.shape[0]
    read = role != "embedding" or (tied and is_embedding(tensor))
    return Counted(role, tensor.type, tensor.numel, tensor.bytes, share, read)


def _has_shared(header: Header) -> int | None:
    """Families with a single shared expert do not count it in a key."""
    return 1 if any(role_of(tensor.name) == "shared expert" for tensor in header.tensors) else None


def _tokenizer(header: Header) -> str:
    model, pre = (header.text(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is None:
        return "none"
    tokens = header.arrays.get("tokenizer.ggml.tokens")
    count = 0 if tokens is None else tokens.count
    template = "with" if "tokenizer.chat_template" in header.metadata else "without"
    return f"{model}, pre-tokenizer {pre or '(none)'}, {count:,} tokens, {template} chat template"


def _notes(header: Header) -> tuple[str, ...]:
    notes = []
    if data := header.text("quantize.imatrix.dataset"):
        notes.append(f"importance matrix from: {data}")
    for key, word in (
        ("attention.key_length_mla", "multi-head latent attention"),
        ("attention.sliding_window", ""),
    ):
        if value := header.largest(key):
            notes.append(word or f"sliding window of {value:,} tokens in some or all layers")
    return tuple(notes)
