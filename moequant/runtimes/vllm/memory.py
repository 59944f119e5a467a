"""What vLLM keeps on each GPU: weights, KV cache, and room to compute.

Everything here was read in the code of vLLM 0.32 and nothing was measured on a GPU. The files are named where
they are followed. `tests/clients/test_vllm_code.py` holds the cache against vLLM's own classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from moequant.checkpoint import Checkpoint
from moequant.errors import PlanError
from moequant.runtimes.context import usual_context
from moequant.values import ModelShape, Role, Weight

UTILIZATION = 0.92
"""Share of a GPU's memory that vLLM takes when nobody says (`gpu_memory_utilization` in config/cache.py)."""

BLOCK = 16
"""Tokens of a block of the cache (`DEFAULT_BLOCK_SIZE` in config/cache.py)."""

CACHE_BYTES = {"auto": 2, "fp8": 1}
"""Bytes of a number in the cache; `auto` is the model's own type, of 16 bits."""

RESERVE = 2**30
"""Bytes for what follows no formula: CUDA graphs, which are counted in since 0.21, NCCL's buffers and small
tensors. A guess."""

SORTED = 30
"""Bytes of every logit while tokens are drawn: float32 logits, and their sorted copies, indices,
probabilities and sums (`Sampler` in v1/sample/)."""

_GIB = 2**30

_WHOLE = frozenset(
    {
        Role.NORM,
        Role.BIAS,
        Role.SCALE,
        Role.STREAMS,
        Role.ROUTER,
        Role.SHARED_ROUTER,
        Role.CORRECTION,
        Role.Q_A,
        Role.KV_A,
        Role.LATENT_DOWN,
        Role.LATENT_UP,
    }
)
"""What every GPU holds as a whole: `ReplicatedLinear`, and vectors."""

_UNKNOWN = frozenset(
    {
        Role.COMPRESSOR,
        Role.OUT_A,
        Role.INDEXER,
        Role.INDEXER_WEIGHTS,
        Role.STATE,
        Role.CONV,
        Role.SSM_IN,
        Role.SSM_X,
        Role.SSM_DT,
        Role.SSM_OUT,
    }
)
"""Attention with a cache of its own kind, which nobody has described here."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served: `ctx` tokens for each of `parallel` sequences, 0 for what is usual, on `tp` GPUs
    that share every weight, with the cache in `cache_type` (one of `CACHE_BYTES`). PlanError for what is no
    such load."""

    ctx: int = 0
    parallel: int = 1
    tp: int = 1
    cache_type: str = "auto"

    def __post_init__(self) -> None:
        """See the class."""
        for name in ("parallel", "tp"):
            if getattr(self, name) < 1:
                raise PlanError(f"--{name} {getattr(self, name)}: 1 or more was expected")
        if self.ctx < 0:
            raise PlanError(f"--ctx {self.ctx}: 1 or more was expected")
        if self.cache_type not in CACHE_BYTES:
            raise PlanError(f"--cache-type {self.cache_type}: {' or '.join(CACHE_BYTES)} was expected")

    def within(self, limit: int | None) -> Serving:
        """The same with a context; `limit` is the model's."""
        return self if self.ctx else replace(self, ctx=usual_context(limit))

    def batch(self, vram: int) -> int:
        """Tokens that are computed at once on GPUs of so many bytes (`get_batch_defaults` in
        engine/arg_utils.py; an A100 computes fewer)."""
        least = 16384 if vram >= 160 * _GIB else 8192 if vram >= 70 * _GIB else 2048
        return max(self.parallel, min(least, self.ctx * self.parallel))


def check(checkpoint: Checkpoint, serving: Serving) -> None:
    """PlanError for a model or a load that the GPUs cannot share, or whose cache is not described."""
    shape, tp = checkpoint.shape, serving.tp
    if checkpoint.encodes:
        raise PlanError(
            f"{checkpoint.path}: vLLM has no model with an encoder, a decoder and experts; transformers runs "
            "the folder that moequant convert --format safetensors writes"
        )
    if shape.context and serving.ctx > shape.context:
        raise PlanError(
            f"{checkpoint.path}: --ctx {serving.ctx:,} is more than the model's context; give --ctx "
            f"{shape.context} or less"
        )
    if other := next((w for w in _running(checkpoint) if w.role in _UNKNOWN), None):
        raise PlanError(
            f"{checkpoint.path}: {other.name} belongs to attention whose cache in vLLM is not known to "
            "moequant yet; vLLM prints what it reserves when it starts"
        )
    if shape.kv_heads < 1 or not cell_bytes(checkpoint, serving):
        raise PlanError(f"{checkpoint.path}: has no keys and values to cache; is its config.json whole?")
    if not shape.heads_on(tp):
        raise PlanError(
            f"--tp {tp}: does not divide {shape.heads} heads, or their {shape.kv_heads} of keys and values"
        )


def bytes_on_gpu(weight: Weight, size: int, checkpoint: Checkpoint, tp: int) -> int:
    """Of a weight of `size` bytes what each of `tp` GPUs holds.

    `Q_A` and `KV_A` are whole everywhere, keys and values as many heads as a GPU has, at least one; `KV_B` is
    there a second time in 16 bits (model_executor/layers/attention/mla_attention.py). The rest is cut.
    """
    if not weight.runs:
        return 0  # read for drafting alone
    if weight.role in _WHOLE or len(weight.shape) == 1:
        return size
    if weight.role in (Role.ATTN_K, Role.ATTN_V):
        heads = checkpoint.shape.kv_heads
        return math.ceil(size * max(1, heads // tp) / heads)
    again = 2 * weight.numel if weight.role is Role.KV_B else 0
    return math.ceil((size + again) / tp)


def cache_bytes(checkpoint: Checkpoint, serving: Serving, batch: int) -> int:
    """Bytes of the KV cache on each GPU, for all sequences with their context full.

    A layer with a window keeps the window and two batches in flight (`SlidingWindowSpec` in
    v1/kv_cache_interface.py); of latent attention every GPU keeps all. What vLLM adds where groups of full
    and windowed layers differ in number is left out.
    """
    total = 0
    for layer, per_token in cell_bytes(checkpoint, serving).items():
        window = _window(checkpoint, layer)
        tokens = serving.ctx if window is None else min(window - 1 + 2 * batch, serving.ctx)
        blocks = math.ceil(tokens / BLOCK) + (window is not None)
        total += blocks * BLOCK * per_token
    return total * serving.parallel


def cell_bytes(checkpoint: Checkpoint, serving: Serving) -> dict[int, int]:
    """Bytes of one token in the cache of every layer on each GPU."""
    shape, number = checkpoint.shape, CACHE_BYTES[serving.cache_type]
    heads = max(1, shape.kv_heads // serving.tp)
    rows: dict[int, dict[Role, int]] = {}
    for weight in _running(checkpoint):
        if weight.layer is not None and len(weight.shape) > 1:
            rows.setdefault(weight.layer, {})[weight.role] = weight.shape[-2]
    found = {}
    for layer, of in rows.items():
        if Role.KV_A in of:
            found[layer] = of[Role.KV_A] * number
        elif Role.ATTN_K in of:  # where values are the keys both are kept
            both = of[Role.ATTN_K] + of.get(Role.ATTN_V, of[Role.ATTN_K])
            found[layer] = both // shape.kv_heads * heads * number
        elif Role.ATTN_QKV in of:
            found[layer] = 2 * shape.head_dim * heads * number
    return found


def compute_bytes(checkpoint: Checkpoint, serving: Serving, batch: int) -> int:
    """An estimate of what a batch takes at its peak, in numbers of 16 bits.

    The experts' two workspaces stay allocated (`workspace_shapes` of Marlin's and Triton's experts in
    model_executor/layers/fused_moe/experts/). Beside them are some hidden states with the widest of attention
    and dense layers, or else the logits of one token a sequence while it is drawn.
    """
    shape, tp = checkpoint.shape, serving.tp
    expert = _largest(checkpoint, Role.DOWN) // tp
    dense = max(_largest(checkpoint, Role.DENSE_DOWN), _largest(checkpoint, Role.SHARED_DOWN)) // tp
    attention = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) // tp
    experts = shape.experts_used * (max(expert, shape.hidden) + max(2 * expert, shape.hidden))
    hidden = 2 * batch * (5 * shape.hidden + max(attention, 3 * dense))
    return 2 * batch * experts + max(hidden, SORTED * shape.vocab * serving.parallel)


def stored_bytes(weights: Iterable[Weight]) -> dict[str, int]:
    """By weight, what the checkpoint's own form takes on a GPU: codes and scales as they are stored, floats
    in 16 bits; weights that share a stored tensor have their part of it."""
    found = {}
    for weight in weights:
        stored = weight.origin.stored
        if stored[0].codec.name == "plain":
            found[weight.name] = 2 * weight.numel
        else:
            numbers = sum(prod(each.shape) for each in stored)
            found[weight.name] = round(weight.origin.bytes * weight.numel / numbers)
    return found


def active_share(weight: Weight, shape: ModelShape) -> float:
    """How much of a weight one token reads."""
    if weight.role is Role.EMBEDDING and not shape.tied:
        return 0.0
    return shape.experts_used / shape.experts if weight.is_expert else 1.0


def _running(checkpoint: Checkpoint) -> Iterable[Weight]:
    return (weight for weight in checkpoint.weights if weight.runs)


def _window(checkpoint: Checkpoint, layer: int) -> int | None:
    """Tokens that a layer looks back on, None for all."""
    kinds = getattr(checkpoint.config, "layer_types", None)
    window = getattr(checkpoint.config, "sliding_window", None)
    return int(window) if kinds and window and "sliding" in kinds[layer] else None


def _largest(checkpoint: Checkpoint, role: Role) -> int:
    """The width of the widest hidden layer of feed-forward blocks of a kind."""
    return max((w.n_in for w in _running(checkpoint) if w.role is role and len(w.shape) > 1), default=0)
