"""What llama.cpp keeps in memory besides the weights: KV cache, recurrent state, compute buffers.

The rules are those of llama.cpp b11434 (llama-kv-cache*.cpp, llama-hparams.cpp); the compute buffer is
ggml's allocator at work on a graph and has no closed form, so it is bounded from above by the widest stage of
a layer, see `compute_bytes`. tests/test_fit.py holds all of it against what llama.cpp itself reports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moequant.containers.gguf.header import Header
from moequant.errors import CheckpointError, PlanError
from moequant.runtimes.context import usual_context

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
        "minimax-01",
        "kimi-k3",
        "dots3note",
    }
)
"""Architectures with caches of their own kind, which nobody has described here."""


COMPRESSED = "deepseek4"
"""The architecture that keeps a window of keys, which are the values too, and entries of several older
tokens each."""

BLOCKS = "qwen4exp"
"""The architecture whose indexer scores blocks of tokens, and whose layer with a table keeps what it
convolved."""

_ENTRIES = 3.2
"""Bytes for each token of a batch and of the context while those entries are chosen: masks and scores."""

_WAITING = 10
"""Copies of what waits to become an entry, at once."""

_FEW = 128
"""Entries of fewer tokens than these overlap, and an indexer chooses among them."""

_STREAMS = 6.5
"""Hidden states beside the usual ones where layers read one out of four streams."""

_SCORED = 8
"""Bytes for each token of a batch and of the context while an indexer scores them: scores and masks."""

_CHOSEN = 16
"""Bytes for each token of a batch and each of those that are chosen for it."""

_SCANNED = (5, 6)
"""Copies of what a layer with states works on: of its inner width, and of the states of its groups."""

_CHUNKED = 2
"""The same of delta rules: of what goes through the convolution, and of what comes out."""

_STATES = 2
"""Copies of a layer's states, of all sequences, while it computes."""

_ROWS = 16
"""Bytes for each number that an indexer of pools keeps of a token, of all sequences at once."""

_BY_HEAD = (6, 8)
"""Of an indexer that chooses for each head of keys: what `_SCORED` is without heads, and what each adds, of
one sequence at a time."""


_BY_BLOCK = (5, 30)
"""Of an indexer that scores blocks of tokens: what `_SCORED` is for large ones, and what is added where they
are small, divided by the square of their size. Read off llama.cpp's figures for blocks of 2 to 64."""

_BLOCKS = 64
"""llama.cpp rounds the number of blocks up to a multiple of it."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a model is served: tokens of context for each of `parallel` sequences, 0 for what is usual, and the
    cache's type."""

    ctx: int = 0
    parallel: int = 1
    cache_type: str = "f16"

    def within(self, limit: int | None) -> Load:
        """The same with a context; `limit` is the model's."""
        return self if self.ctx else replace(self, ctx=usual_context(limit))

    @property
    def cells(self) -> int:
        """Cache cells of one sequence: llama.cpp rounds the context up to 256."""
        return _padded(self.ctx)


def kv_bytes(header: Header, load: Load) -> tuple[int, ...]:
    """Bytes of KV cache and recurrent state of every layer, for all sequences.

    Raises PlanError for an architecture with a cache that is not described here, and for a cache type whose
    blocks do not divide the heads; CheckpointError for keys that are no counts.
    """
    if header.arch in UNMODELLED:
        raise PlanError(
            f"{header.path}: the KV cache of {header.arch!r} is not known to moequant yet; "
            "llama-fit-params prints what llama.cpp reserves"
        )
    layers = header.layers
    windowed = _windowed(header, layers)
    recurrent = {tensor.layer for tensor in header.tensors if _RECURRENT.match(tensor.name)}
    own = layers - header.count("attention.shared_kv_layers")
    found = []
    for layer in range(layers):
        if layer >= layers - header.count("nextn_predict_layers"):
            found.append(0)  # made for drafting alone
        elif layer in recurrent:
            found.append((_state_bytes(header, layer) + _looked_up(header, layer)) * load.parallel)
        elif header.arch == COMPRESSED:
            found.append(_compressed_bytes(header, layer, load) * load.parallel)
        elif layer < own:
            cells = _window_cells(header, load) if windowed[layer] else load.cells
            found.append(cells * load.parallel * _cell_bytes(header, layer, windowed[layer], load.cache_type))
        else:
            found.append(0)
    return tuple(found)


def compute_bytes(header: Header, load: Load) -> int:
    """An upper bound of the compute buffer with flash attention on.

    Live at once are the attention mask (f16) and the widest of five stages, each beside a handful of hidden
    states: the head's logits for a whole batch; three intermediates or two outputs of each of the k experts;
    a dense block's three intermediates; the heads' queries and outputs; what a layer with states works on,
    and the states. The factors were read off llama.cpp's own figures for thirty shapes (docs/fitting.md).
    """
    width = 4 * UBATCH
    hidden = header.count("embedding_length")
    used, experts = header.largest("expert_used_count"), header.largest("expert_count")
    dense = header.largest("feed_forward_length")
    expert = header.largest("expert_feed_forward_length") or (dense if experts else 0)
    heads = header.largest("attention.head_count")
    keys = header.count("attention.key_length") or (hidden // heads if heads else 0)
    weighted = hidden if header.arch == "llama4" else 0  # the router's weights scale what experts are fed
    stages = (
        vocabulary(header),
        used * (max(3 * expert, 2 * hidden) + weighted) + 2 * experts,
        3 * dense if not experts or header.count("leading_dense_block_count") else 0,
        3 * heads * keys,
    )
    cells = load.cells
    layers = header.layers
    if any(_windowed(header, layers)):
        cells += _window_cells(header, load)
    scanned, states = _scanned(header, load)
    # Pictures come as hidden states too, for as many layers.
    beside = (6 + 4 * header.count("n_deepstack_layers")) * hidden
    widest = max(width * (max(stages) + beside), width * (scanned + beside) + states)
    usual = cells * UBATCH * 2 + widest + _SMALL
    if header.arch != COMPRESSED:
        return max(usual, _indexed_bytes(header, load, widest)) if _indexer(header) else usual
    waiting = 2 * 4 * _FEW * keys * load.parallel
    chosen = int(_ENTRIES * cells * UBATCH) + width * 3 * heads * keys + _WAITING * waiting
    return max(usual + int(_STREAMS * width * hidden), chosen)


def _scanned(header: Header, load: Load) -> tuple[int, int]:
    """Of the widest layer with states: numbers for each token while it computes, and bytes of its states."""
    found = {tensor.layer for tensor in header.tensors if _RECURRENT.match(tensor.name)}
    layers = sorted(layer for layer in found if layer is not None)
    inner = header.count("ssm.inner_size")
    if not layers or not (inner or header.count("kda.head_dim")):
        return 0, 0
    states = _STATES * max(_state_bytes(header, layer) for layer in layers) * load.parallel
    groups = header.count("ssm.group_count") * header.count("ssm.state_size")
    if any(".ssm_in." in tensor.name for tensor in header.tensors):
        small = header.count("ssm.time_step_rank") + 2 * header.count("ssm.state_size")
        return _SCANNED[0] * inner + _SCANNED[1] * groups + small, states
    if kda := header.count("kda.head_dim"):
        inner = groups = kda * max(header.at("attention.head_count", layer) for layer in layers)
    return _CHUNKED * (inner + 2 * groups + inner), states


def _indexer(header: Header) -> int:
    """Numbers of the key that an indexer keeps of a token; 0 without one."""
    return header.count("attention.indexer.key_length")


def _indexed_bytes(header: Header, load: Load, widest: int) -> int:
    """What is live while an indexer chooses: first its queries beside the hidden states, then a score and a
    mask for every token of the context beside what is `widest`; what is chosen in both.

    It may choose pools of tokens, or blocks of them for each head of keys.
    """
    width, hidden, cells = 4 * UBATCH, header.count("embedding_length"), load.cells
    queries = width * header.count("attention.indexer.head_count") * _indexer(header)
    pool, most, every = _pool(header), header.count("attention.indexer.top_k"), cells * load.parallel
    chosen = _CHOSEN * min(every if pool else cells, most)
    scored, rows = float(_SCORED), 0
    if header.arch == "minimax-m3":
        alone, head = _BY_HEAD
        chosen, scored = 0, alone + head * header.largest("attention.head_count_kv") / load.parallel
    elif header.arch == BLOCKS and pool:
        alone, few = _BY_BLOCK
        blocks = -(-(cells // pool + 1) // _BLOCKS) * _BLOCKS
        chosen, scored = _CHOSEN * min(pool * blocks, most), alone + few / pool**2
    elif pool:
        scored = _BY_HEAD[0] + 3 / pool
        rows = int((_ROWS * _indexer(header) + 2 * UBATCH / pool) * every) + 2 * cells * UBATCH + widest
    first = 2 * queries + 8 * width * hidden + 4 * cells * UBATCH
    then = int(scored * cells * UBATCH) + max(queries, widest)
    streams = int(_STREAMS * width * hidden) if pool or header.count("hyper_connection.count") else 0
    return max(max(first, then) + chosen * UBATCH, rows) + streams + 8 * every + _SMALL


def _pool(header: Header) -> int:
    """Tokens that an indexer scores as one; 0 where it scores each."""
    if header.arch == BLOCKS:
        return header.largest("attention.compress_ratios")
    return header.count("attention.indexer.kpool")


def host_compute_bytes(header: Header, load: Load) -> int:
    """What stays in system memory when the GPU computes: inputs of a batch and the logits of one token."""
    hidden = header.count("embedding_length")
    return load.cells * UBATCH * 2 + 4 * UBATCH * hidden + 4 * vocabulary(header) * load.parallel


def vocabulary(header: Header) -> int:
    """Rows of the output head."""
    for tensor in header.tensors:
        if tensor.name in ("output.weight", "token_embd.weight"):
            return tensor.shape[0]
    return 0


def experts_used(header: Header, layer: int, experts: int) -> int:
    """Of a layer's `experts`, those that a token reaches; all where no key says. CheckpointError for more."""
    used = header.at("expert_used_count", layer, experts)
    if used > experts:
        raise CheckpointError(
            f"{header.path}: a token reaches {used:,} experts of layer {layer}, which has {experts:,}; "
            "make it again"
        )
    return used


def _cell_bytes(header: Header, layer: int, windowed: bool, cache_type: str) -> int:
    """Bytes of one token in one layer; MLA keeps a single compressed row and no values. An indexer keeps rows
    of its own."""
    heads = header.at("attention.head_count", layer)
    heads_kv = header.at("attention.head_count_kv", layer, heads)
    default = header.count("embedding_length") // heads if heads else 0
    suffix = "_swa" if windowed and header.count("attention.key_length_swa") else ""
    keys = heads_kv * header.count(f"attention.key_length{suffix}", default)
    values = heads_kv * header.count(f"attention.value_length{suffix}", default)
    if header.count("attention.key_length_mla"):
        values = 0
    rows = (keys, values, *_indexer_rows(header, layer, values))
    return sum(_row_bytes(row, cache_type) for row in rows)


def _indexer_rows(header: Header, layer: int, values: int) -> tuple[int, ...]:
    """What the indexer of a layer keeps of a token, in numbers; nothing where a layer takes the choice of
    another, or has none."""
    size = _indexer(header)
    own = header.get("attention.indexer.types")
    if isinstance(own, tuple) and not own[layer]:
        return ()
    match header.arch:
        case "qwen4exp":  # keys, and one more row of which blocks of tokens are made
            return (2 * size,)
        case "glm5-next":  # keys, and two more rows of which pools of tokens are made
            return (3 * size,)
        case "minimax-m3":  # one head, with values as the layer's own have them; none in front
            dense = layer < header.count("leading_dense_block_count")
            return () if dense else (size, values // header.at("attention.head_count_kv", layer, 1))
    return (size,)


def _row_bytes(width: int, cache_type: str) -> int:
    """Bytes of a row of the cache. PlanError when the type's blocks do not divide it."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    if width % block:
        raise PlanError(f"cache type {cache_type}: blocks of {block} do not divide rows of {width}; use f16")
    return width // int(block) * int(block_bytes)


def _compressed_bytes(header: Header, layer: int, load: Load) -> int:
    """A layer of one sequence that keeps a window and, of each `ratio` older tokens, an entry; where an
    indexer chooses among those, another one for it.

    Tokens of which no entry is made yet wait in float32, with what each counts. Where few make an entry,
    those of the entry before wait as well, and two numbers stand for one.
    """
    ratio, width = header.at("attention.compress_ratios", layer), header.count("attention.key_length")
    kept = _window_cells(header, load) * _row_bytes(width, load.cache_type)
    if not ratio:
        return kept
    few = ratio < _FEW
    widths = [width, header.count("attention.indexer.key_length")] if few else [width]
    entries = _padded(-(-load.cells // ratio))
    for each in widths:
        waiting = 4 * ratio * each if few else ratio * each
        kept += entries * _row_bytes(each, load.cache_type) + 2 * 4 * waiting
    return kept


def _state_bytes(header: Header, layer: int) -> int:
    """Recurrent state of one sequence in one layer, f32: convolution history and hidden state."""
    hidden, heads = header.count("embedding_length"), header.at("attention.head_count", layer)
    if short := header.count("shortconv.l_cache"):
        return 4 * hidden * (short - 1)
    kernel = header.count("ssm.conv_kernel")
    if kda := header.count("kda.head_dim"):
        return 4 * (3 * max(kernel - 1, 0) * heads * kda + kda * kda * heads)
    inner, state = header.count("ssm.inner_size"), header.count("ssm.state_size")
    groups = header.count("ssm.group_count")
    return 4 * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


def _looked_up(header: Header, layer: int) -> int:
    """What a layer that looks tokens up in a table keeps of one sequence: inputs of a convolution over every
    n-th token, of all streams, f32."""
    layers = header.get("ple.layers")
    if header.arch != BLOCKS or not isinstance(layers, tuple) or layer not in layers:
        return 0
    wide = header.count("hyper_connection.count") * header.count("embedding_length")
    return 4 * max(header.count("ple.conv_kernel") - 1, 0) * header.count("ple.ngram_size") * wide


def _window(header: Header) -> int:
    # Fixed in llama.cpp's code, whatever the file says, but for 0.
    fixed = {"llama4": 8192, "smallthinker": 4096}.get(header.arch, 0)
    window = header.count("attention.sliding_window", fixed)
    return window and (fixed or window)


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
    period = header.count("attention.sliding_window_pattern") or period
    full = 0 if full_first else period - 1
    return tuple(layer % period != full for layer in range(layers))


def _window_cells(header: Header, load: Load) -> int:
    return _padded(min(load.cells, _window(header) + UBATCH))


def _padded(cells: int) -> int:
    return -(-cells // 256) * 256
