"""What llama.cpp keeps in memory besides the weights: KV cache, recurrent state, compute buffers.

The rules are those of llama.cpp b11434 (llama-kv-cache*.cpp, llama-hparams.cpp); the compute buffer is
ggml's allocator at work on a graph and has no closed form, so it is bounded from above by the widest stage of
a layer, see `compute_bytes`. tests/test_fit.py holds all of it against what llama.cpp itself reports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moequant.containers.gguf.header import Header
from moequant.errors import PlanError

UBATCH = 512
"""Tokens that llama.cpp computes at once (`-ub`): the width of every buffer."""

_SMALL = 2**17
"""Positions, indices and the rotation of a quantized cache, in bytes: 2 to 100 KiB were seen."""

CACHE_TYPES = ("f16", "q8_0")

_SWA_PERIOD: Mapping[str, tuple[int, bool]] = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "cohere2moe": (4, True),
    "exaone-moe": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "llama4": (4, False),
    "mellum": (4, False),
    "smallthinker": (4, True),
}
"""Architectures whose window pattern is in llama.cpp's code: (period, the full layer comes first). Others
list their layers in the file, or ignore the window."""

_RECURRENT = re.compile(r"blk\.\d+\.(ssm_|shortconv)")

UNMODELLED = frozenset(
    {
        "deepseek4",
        "minimax-m3",
        "minimax-01",
        "glm5-next",
        "hy_v4",
        "qwen4exp",
        "kimi-k3",
        "bailingmoe3",
        "dots3note",
    }
)
"""Architectures with caches of their own kind, which nobody has described here."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a model is served: tokens of context for each of `parallel` sequences, and the cache's type."""

    ctx: int
    parallel: int = 1
    cache_type: str = "f16"

    @property
    def cells(self) -> int:
        """Cache cells of one sequence: llama.cpp rounds the context up to 256."""
        return _padded(self.ctx)


def kv_bytes(header: Header, load: Load) -> tuple[int, ...]:
    """Bytes of KV cache and recurrent state of every layer, for all sequences.

    Raises PlanError for an architecture with a cache that is not described here, and for a cache type whose
    blocks do not divide the heads.
    """
    if header.arch in UNMODELLED:
        raise PlanError(
            f"{header.path}: the cache of {header.arch!r} is not described yet; "
            "llama-fit-params prints what llama.cpp reserves"
        )
    layers = int(header.get("block_count", 0))
    windowed = _windowed(header, layers)
    recurrent = {tensor.layer for tensor in header.tensors if _RECURRENT.match(tensor.name)}
    own = layers - int(header.get("attention.shared_kv_layers", 0) or 0)
    found = []
    for layer in range(layers):
        if layer in recurrent:
            found.append(_state_bytes(header, layer) * load.parallel)
        elif layer < own:
            cells = _window_cells(header, load) if windowed[layer] else load.cells
            found.append(cells * load.parallel * _cell_bytes(header, layer, windowed[layer], load.cache_type))
        else:
            found.append(0)
    return tuple(found)


def compute_bytes(header: Header, load: Load) -> int:
    """An upper bound of the compute buffer with flash attention on.

    Live at once are the attention mask (f16) and the widest of four stages, each beside a handful of hidden
    states: the head's logits for a whole batch; three intermediates or two outputs of each of the k experts;
    a dense block's three intermediates; the heads' queries and outputs. The factors were read off llama.cpp's
    own figures for ten shapes (docs/fitting.md).
    """
    width = 4 * UBATCH
    hidden = int(header.get("embedding_length", 0))
    used, experts = _largest(header, "expert_used_count"), _largest(header, "expert_count")
    dense = _largest(header, "feed_forward_length")
    expert = _largest(header, "expert_feed_forward_length") or (dense if experts else 0)
    heads = _largest(header, "attention.head_count")
    keys = int(header.get("attention.key_length", 0) or (hidden // heads if heads else 0))
    stages = (
        vocabulary(header),
        used * max(3 * expert, 2 * hidden) + 2 * experts,
        3 * dense if not experts or header.get("leading_dense_block_count") else 0,
        3 * heads * keys,
    )
    cells = load.cells
    layers = int(header.get("block_count", 0))
    if any(_windowed(header, layers)):
        cells += _window_cells(header, load)
    return cells * UBATCH * 2 + width * (max(stages) + 6 * hidden) + _SMALL


def host_compute_bytes(header: Header, load: Load) -> int:
    """What stays in system memory when the GPU computes: inputs of a batch and the logits of one token."""
    hidden = int(header.get("embedding_length", 0))
    return load.cells * UBATCH * 2 + 4 * UBATCH * hidden + 4 * vocabulary(header) * load.parallel


def vocabulary(header: Header) -> int:
    """Rows of the output head."""
    for tensor in header.tensors:
        if tensor.name in ("output.weight", "token_embd.weight"):
            return tensor.shape[0]
    return 0


def experts_used(header: Header, layer: int) -> int:
    """Experts that a token reaches in a layer."""
    return int(_at(header.get("expert_used_count", 0), layer))


def _cell_bytes(header: Header, layer: int, windowed: bool, cache_type: str) -> int:
    """Bytes of one token in one layer; MLA keeps a single compressed row and no values."""
    heads = int(_at(header.get("attention.head_count", 0), layer))
    heads_kv = int(_at(header.get("attention.head_count_kv", heads), layer))
    default = int(header.get("embedding_length", 0)) // heads if heads else 0
    suffix = "_swa" if windowed and header.get("attention.key_length_swa") else ""
    keys = heads_kv * int(header.get(f"attention.key_length{suffix}", default))
    values = heads_kv * int(header.get(f"attention.value_length{suffix}", default))
    if header.get("attention.key_length_mla"):
        values = int(header.get("attention.indexer.key_length", 0) or 0)
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    if keys % block or values % block:
        raise PlanError(
            f"cache type {cache_type}: blocks of {block} do not divide rows of {keys} and {values}; use f16"
        )
    return (keys + values) // int(block) * int(block_bytes)


def _state_bytes(header: Header, layer: int) -> int:
    """Recurrent state of one sequence in one layer, f32: convolution history and hidden state."""
    hidden, heads = (
        int(header.get("embedding_length", 0)),
        int(_at(header.get("attention.head_count", 0), layer)),
    )
    if short := int(header.get("shortconv.l_cache", 0) or 0):
        return 4 * hidden * (short - 1)
    kernel = int(header.get("ssm.conv_kernel", 0) or 0)
    if kda := int(header.get("kda.head_dim", 0) or 0):
        return 4 * (3 * max(kernel - 1, 0) * heads * kda + kda * kda * heads)
    inner, state = int(header.get("ssm.inner_size", 0) or 0), int(header.get("ssm.state_size", 0) or 0)
    groups = int(header.get("ssm.group_count", 0) or 0)
    return 4 * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


def _window(header: Header) -> int:
    window = header.get("attention.sliding_window")
    if header.arch in ("llama4", "smallthinker") and window != 0:
        return 8192 if header.arch == "llama4" else 4096  # fixed in llama.cpp's code, whatever the file says
    return int(window or 0)


def _windowed(header: Header, layers: int) -> tuple[bool, ...]:
    """Which layers keep only a window of tokens."""
    pattern = header.get("attention.sliding_window_pattern")
    if not _window(header):
        return (False,) * layers
    if isinstance(pattern, tuple):
        return tuple(bool(flag) for flag in pattern[:layers]) + (False,) * (layers - len(pattern))
    if header.arch not in _SWA_PERIOD:
        return (False,) * layers
    period, full_first = _SWA_PERIOD[header.arch]
    period = int(pattern or period)
    full = 0 if full_first else period - 1
    return tuple(layer % period != full for layer in range(layers))


def _window_cells(header: Header, load: Load) -> int:
    return _padded(min(load.cells, _window(header) + UBATCH))


def _at(value: Any, layer: int) -> Any:
    """The layer's element of a per-layer array, or the one value for all."""
    return value[layer] if isinstance(value, tuple) else value


def _largest(header: Header, key: str) -> int:
    value = header.get(key, 0) or 0
    return int(max(value) if isinstance(value, tuple) else value)


def _padded(cells: int) -> int:
    return -(-cells // 256) * 256
