"""Model weights: what transformers computes with, in torch's shapes, under names of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from math import prod
from typing import Literal

from moequant.values.ops import Ops, on_rows, shape_after
from moequant.values.stored import Stored


class Role(StrEnum):
    """What a weight does in the model."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    BIAS = "bias"
    SCALE = "scale"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_QKV = "attn_qkv"
    ATTN_OUT = "attn_out"
    OUT_A = "out_a"
    OUT_B = "out_b"
    ATTN_GATE = "attn_gate"
    Q_A = "q_a"
    Q_B = "q_b"
    KV_A = "kv_a"
    KV_B = "kv_b"
    K_B = "k_b"
    V_B = "v_b"
    CROSS_OUT = "cross_out"
    POSITIONS = "positions"
    SINKS = "sinks"
    STREAMS = "streams"
    STREAMS_IN = "streams_in"
    STREAMS_OUT = "streams_out"
    LOOKUP = "lookup"
    LOOKUP_IN = "lookup_in"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    INDEXER_WEIGHTS = "indexer_weights"
    ROUTER = "router"
    CORRECTION = "correction"
    TABLE = "table"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    SHARED_ROUTER = "shared_router"
    SHARED_GATE_UP = "shared_gate_up"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    DENSE_GATE = "dense_gate"
    DENSE_UP = "dense_up"
    DENSE_DOWN = "dense_down"
    LATENT_DOWN = "latent_down"
    LATENT_UP = "latent_up"
    STATE = "state"
    CONV = "conv"
    SSM_IN = "ssm_in"
    SSM_X = "ssm_x"
    SSM_DT = "ssm_dt"
    SSM_OUT = "ssm_out"
    NEXTN = "nextn"

    @property
    def is_expert(self) -> bool:
        """Whether it is a product of routed experts."""
        return self in (Role.GATE, Role.UP, Role.DOWN)

    @property
    def keeps_precision(self) -> bool:
        """Vectors and routers are small and decide much: they stay F32 in every file. Tables are whole
        numbers, which nobody rounds."""
        return self in _PRECISE


_PRECISE = frozenset(
    {
        Role.NORM,
        Role.BIAS,
        Role.SCALE,
        Role.POSITIONS,
        Role.SINKS,
        Role.STREAMS,
        Role.ROUTER,
        Role.INDEXER_WEIGHTS,
        Role.CORRECTION,
        Role.TABLE,
        Role.SHARED_ROUTER,
        Role.STATE,
        Role.CONV,
    }
)


class Stack(Enum):
    """What the first of three dimensions counts."""

    NONE = auto()
    EXPERTS = auto()
    HEADS = auto()


@dataclass(frozen=True, slots=True)
class Site:
    """Activations that weights multiply: those with one site share their statistics.

    `name` is what statistics call it. `module` is where they are seen in the transformers model: at its
    input or output, or, for a module of experts, before its first product ("experts") or its second
    ("inner"). `ops` lead from what is seen there [.., width] to [.., in] or, with `heads`, for a stack of
    heads, to [.., heads, in].
    """

    name: str
    module: str
    side: Literal["input", "output", "experts", "inner"] = "input"
    ops: Ops = ()
    heads: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight lives in the transformers model: `ops` make it of the parameter or buffer `param`."""

    param: str
    ops: Ops = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a weight's values come from: each of `stored`, or each matrix of the one stack, through `ops`.

    Several stored tensors are stacked, one expert behind the other; of a weight that is no stack of experts,
    the rows of one follow those of the other. `holds` is the ggml type that has the very numbers of all of
    them. Of what is stored, `matrices` are those of the weight, and `rows`, in rising order, those of a table
    (None: all).
    `pieces` are stored as ops of a container cut the weight: what is cut so again is taken as it is.
    """

    stored: tuple[Stored, ...]
    ops: Ops = ()
    holds: str | None = None
    matrices: range | None = None
    rows: range | tuple[int, ...] | None = None
    pieces: tuple[tuple[Ops, Origin], ...] = ()

    def through(self, ops: Ops) -> Origin:
        """Where the values of what ops make of the weight come from."""
        whole = replace(self, ops=(*self.ops, *ops), pieces=())
        return next((piece for cut, piece in self.pieces if cut == ops), whole)

    @property
    def shipped(self) -> str | None:
        """The ggml type that holds exactly what is stored; None when there is none, or ops cut its blocks."""
        return self.holds if all(on_rows(op) for op in self.ops) else None

    @property
    def dtype(self) -> str:
        """What it decodes to, as safetensors names it."""
        return self.stored[0].dtype

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors; weights that share one count it each."""
        return sum(stored.bytes for stored in self.stored)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the model, in the model's shape and order.

    `shape` is `(E, out, in)` for a stack, `(out, in)` for a matrix, `(n,)` for a vector. `site` is None
    for what multiplies nothing that is observed: vectors, look-ups, routers. `adds` says that what it
    gives is added to the residual stream as it is. `names` are what checkpoints with a tensor of its own
    for every expert call its matrices.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    stack: Stack
    origin: Origin
    place: Place
    site: Site | None
    names: tuple[str, ...] = ()
    adds: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def fixed_type(self) -> str | None:
        """The ggml type that it has in every file; None for one of which a plan chooses it."""
        if self.role is Role.TABLE:
            return "I32"
        return "F32" if self.role.keeps_precision or len(self.shape) < 2 else None

    @property
    def runs(self) -> bool:
        """Whether transformers' model has it: files also hold what that computes, or does not run."""
        return bool(self.place.param)

    @property
    def is_expert(self) -> bool:
        """Whether only the tokens that the router sends see it."""
        return self.stack is Stack.EXPERTS

    @property
    def is_table(self) -> bool:
        """Whether tokens look up rows of it, as of the embedding, within a layer: it may be larger than all
        else, so nobody reads it whole."""
        return self.role is Role.LOOKUP

    @property
    def matrices(self) -> int:
        """Experts or heads of a stack, 1 otherwise."""
        return self.shape[0] if self.stack is not Stack.NONE else 1

    @property
    def experts(self) -> slice:
        """Which of the experts of its site these are."""
        some = self.origin.matrices
        return slice(None) if some is None else slice(some.start, some.stop)

    @property
    def n_in(self) -> int:
        """Row length: the dimension that a format cuts into blocks."""
        return self.shape[-1]

    def of(self, experts: range) -> Weight:
        """The same weight with some of its experts only."""
        origin = replace(self.origin, matrices=experts)
        return replace(self, shape=(len(experts), *self.shape[1:]), origin=origin)

    def at(self, rows: range | tuple[int, ...]) -> Weight:
        """The same table with some of its rows only, in rising order."""
        origin = replace(self.origin, rows=rows)
        return replace(self, shape=(len(rows), self.n_in), origin=origin)

    def like(self, other: Weight) -> Weight:
        """The same weight with those experts or rows only that `other` has."""
        if other.origin.rows is not None:
            return self.at(other.origin.rows)
        some = other.origin.matrices
        return self if some is None else self.of(some)

    def bands(self, at_once: int) -> Iterator[Weight]:
        """A table in parts of so many numbers, each of rows that follow those before."""
        step = max(1, at_once // self.n_in)
        for first in range(0, self.shape[0], step):
            yield self.at(range(first, min(first + step, self.shape[0])))

    def some(self, at_once: int) -> Iterator[tuple[slice, Weight]]:
        """A stack of experts in parts of so many numbers, with where they are in it; others as a whole."""
        step = max(1, at_once * self.matrices // self.numel) if self.is_expert else self.matrices
        for first in range(0, self.matrices if self.is_expert else 1, step):
            part = range(first, min(first + step, self.matrices))
            yield (slice(part.start, part.stop), self.of(part)) if self.is_expert else (slice(None), self)

    def refined(self, ops: Ops, stack: Stack | None = None, **changes: object) -> Weight:
        """What a container makes of this weight: the same through `ops`, here and in the model.

        Raises ValueError when the ops do not fit its shape.
        """
        made = replace(
            self,
            shape=shape_after(ops, self.shape),
            stack=self.stack if stack is None else stack,
            origin=self.origin.through(ops),
            place=Place(self.place.param, (*self.place.ops, *ops)),
        )
        return replace(made, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """How large a model is, typed: what its config says, absent keys filled by its class.

    `kv_heads` and `head_dim` are those of most layers. `experts` is 0 for a dense model; `context` is the
    longest row that it takes. Layers pass on `streams` hidden states for every token, `in_a_row`
    where they are one vector.
    """

    layers: int
    hidden: int
    vocab: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    experts_used: int = 0
    tied: bool = False
    streams: int = 1
    in_a_row: bool = False

    def heads_on(self, tp: int) -> bool:
        """Whether vLLM can share the heads among so many GPUs: queries evenly, keys and values evenly or each
        on some."""
        return not self.heads % tp and not (self.kv_heads % tp and tp % self.kv_heads)
