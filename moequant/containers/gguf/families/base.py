"""How a family becomes a GGUF file: names, what is cut or reordered, keys, and what llama.cpp computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moequant.errors import FamilyError, one_line
from moequant.families import Config
from moequant.values import Role, Site, Stack, Weight
from moequant.values.ops import Ops

Kind = Literal["u32", "f32", "bool", "str", "u32s", "u64s", "f32s", "bools"]
"""Types of keys; those that end in s are arrays."""

F32 = 3.4e38
"""Numbers of an f32 are below."""

FACTORS = frozenset(
    {
        "attention.scale",
        "attention.value_scale",
        "embedding_scale",
        "expert_weights_scale",
        "logit_scale",
        "residual_scale",
    }
)
"""Keys of which llama.cpp takes 0 for none."""


class Unsayable(FamilyError):
    """The model computes, but no file can tell llama.cpp so; a folder holds the config as it is."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file. Its name is without the architecture's, which is put before it.

    FamilyError for a value that its kind cannot hold, Unsayable for a factor of 0.
    """

    name: str
    kind: Kind
    value: Any

    def __post_init__(self) -> None:
        """See the class."""
        kind = self.kind.removesuffix("s")
        for value in self.value if self.kind.endswith("s") else (self.value,):
            if not _holds(kind, value):
                shown = one_line(repr(value), 80)
                raise FamilyError(f"config.json: GGUF's key {self.name} would be {shown}, which is no {kind}")
        if self.name in FACTORS and self.value == 0:
            raise Unsayable(
                f"config.json: GGUF's key {self.name} would be 0, which llama.cpp takes for no factor: the "
                "file would compute something else"
            )


def _holds(kind: str, value: Any) -> bool:
    """Whether a GGUF type holds the value."""
    if kind in ("bool", "str"):
        return isinstance(value, bool if kind == "bool" else str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind in ("u32", "u64"):
        return isinstance(value, int) and 0 <= value < 1 << int(kind[1:])
    return abs(value) < F32


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of the file that is made of (a part of) a weight.

    `name` is GGUF's, without `blk.N.`; "" is the table's. `own` is our name of the part within its layer,
    None for the weight's own. Blocks of codes run along the rows of what `ops` make, under the statistics
    of `site` where it is given. `shape` is what the file says where it differs, at the same bytes. One that
    is `outside` of the layers has no `blk.N.`, whatever layer the weight is of.
    """

    name: str = ""
    ops: Ops = ()
    own: str | None = None
    role: Role | None = None
    site: Site | None = None
    stack: Stack | None = None
    shape: tuple[int, ...] | None = None
    outside: bool = False


Cut = Callable[[Config, Weight], "tuple[FileTensor, ...] | None"]
"""What the file makes of a weight; None: one tensor, as it is, named by the table."""


def whole(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Every weight as it is."""
    return None


def nothing(config: Config) -> tuple[()]:
    """No tensors beside the weights."""
    return ()


def no_lists(config: Config, number: int) -> Mapping[str, Any]:
    """No key has an entry for every block."""
    return {}


@dataclass(frozen=True, slots=True)
class Drafting:
    """How llama.cpp drafts with layers that predict.

    `lists` says what keys with one entry a block have for the layer `number` of those that predict, from 0.
    `most` layers are read, at most.
    """

    lists: Callable[[Config, int], Mapping[str, Any]] = no_lists
    most: int = 1


DRAFTING = Drafting()
"""With one layer, of which no list of keys has an entry."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that the file has and the model computes: name, and its values in F32."""

    name: str
    values: tuple[float, ...]


def rotations(config: Config) -> tuple[Mapping[str, Any], ...]:
    """The rotary parameters of a config: one for all layers, or one for each kind of them."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = tuple(each for each in found.values() if isinstance(each, Mapping))
    return kinds or (found,)


def yarn_bounds(config: Config) -> tuple[str, ...]:
    """A warning where YaRN has bounds of its own: no graph of these families reads them from the file."""
    bounds = {
        (float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1))
        for rope in rotations(config)
        if rope.get("rope_type") == "yarn"
    }
    return tuple(
        f"llama.cpp does not read YaRN's beta_fast = {fast:g} and beta_slow = {slow:g} from the file and "
        f"takes 32 and 1, so it would compute something else; run it with --yarn-beta-fast {fast:g} "
        f"--yarn-beta-slow {slow:g}"
        for fast, slow in sorted(bounds - {(32.0, 1.0)})
    )


def not_stretched(config: Config) -> tuple[str, ...]:
    """A warning where transformers rotates by another base once a text is longer than the context; a base
    that is stretched once for all is written as it is."""
    if not any(rope.get("rope_type") == "dynamic" and not rope.get("alpha") for rope in rotations(config)):
        return ()
    return (
        f"past max_position_embeddings = {config.max_position_embeddings} tokens transformers stretches the "
        "rotation (rope type 'dynamic'), llama.cpp does not: keep its context within",
    )


def chosen_by_context(config: Config) -> tuple[str, ...]:
    """A warning where llama.cpp asks its context, and transformers the text, which numbers stretch it."""
    lengths = {
        rope.get("original_max_position_embeddings")
        for rope in rotations(config)
        if rope.get("rope_type") == "longrope"
    }
    return tuple(
        f"llama.cpp stretches the rotation (rope type 'longrope') as for long texts where its context is "
        f"longer than {length} tokens, transformers where a text is: give it no more for shorter texts"
        for length in sorted(lengths, key=str)
    )


def twice(config: Config, arch: str) -> tuple[str, ...]:
    """A warning where the file holds the embedding a second time."""
    if not config.tie_word_embeddings:
        return ()
    return (
        f"llama.cpp's {arch!r} takes no embedding for the head (tie_word_embeddings): it is written twice",
    )


FIXED_EPS = 1e-6
"""What transformers norms latents with, and queries and keys of linear attention, whatever rms_norm_eps
says."""


def other_epsilon(config: Config, what: str) -> tuple[str, ...]:
    """A warning where the file's one epsilon is not that of these norms in transformers."""
    if config.rms_norm_eps == FIXED_EPS:
        return ()
    return (
        f"llama.cpp normalises {what} with an epsilon of {config.rms_norm_eps:g}, transformers with "
        f"{FIXED_EPS:g}: logits differ a little",
    )


def no_warnings(config: Config) -> tuple[str, ...]:
    """Both compute the same."""
    return ()


@dataclass(frozen=True, slots=True)
class Export:
    """A family's way into GGUF.

    `arch` is llama.cpp's name of the architecture. `names` are the tensors that are called otherwise than
    in `names.COMMON`, by our name within the layer. `complaints` yields one sentence for each thing in the
    config that llama.cpp's graph does not compute; `warnings` one for each that it computes a little
    differently. `drafting` is None where llama.cpp has no graph that drafts with layers that predict: files
    hold none of those. `own_head` says that the graph takes no embedding for the head: a file has both.
    """

    arch: str
    keys: Callable[[Config], tuple[Key, ...]]
    complaints: Callable[[Config], Iterator[str]]
    names: Mapping[str, str] = field(default_factory=dict)
    cut: Cut = whole
    computed: Callable[[Config], tuple[Computed, ...]] = nothing
    warnings: Callable[[Config], tuple[str, ...]] = no_warnings
    drafting: Drafting | None = None
    own_head: bool = False

    def told(self, config: Config) -> tuple[str, ...]:
        """All warnings: those of every family, then its own."""
        return (
            *yarn_bounds(config),
            *not_stretched(config),
            *chosen_by_context(config),
            *(twice(config, self.arch) if self.own_head else ()),
            *self.warnings(config),
        )


def only(config: Config, arch: str, key: str, *allowed: Any) -> Iterator[str]:
    """A complaint when a config value is none of those that the graph implements."""
    value = getattr(config, key, allowed[0])
    if value not in allowed:
        yield (
            f"config key {key} = {value!r}: llama.cpp's {arch!r} implements only "
            f"{' or '.join(map(repr, allowed))}, the file would compute something else"
        )


def full_attention(config: Config, arch: str) -> Iterator[str]:
    """A complaint when some layer looks at a window that a context can exceed."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        if "sliding_attention" in kinds:
            yield (
                f"config key sliding_window = {window!r}: llama.cpp's {arch!r} implements only full "
                "attention, the file would compute something else"
            )


def some_window(config: Config, arch: str) -> Iterator[str]:
    """A complaint when no layer looks at a window: graphs that know both kinds need one."""
    if "sliding_attention" not in config.layer_types:
        yield f"config key layer_types: llama.cpp's {arch!r} needs layers with a window"


def both_kinds(key: str, states: Iterable[bool], arch: str) -> Iterator[str]:
    """A complaint when all layers have a state, or none: graphs of hybrids keep a memory of both kinds."""
    if len(set(states)) < 2:
        yield f"config key {key}: llama.cpp's {arch!r} needs layers with attention, and others without"


def whole_indexers(config: Config, arch: str) -> Iterator[str]:
    """A complaint about heads of indexers that graphs do not turn by whole matrices of 64 rows."""
    width = config.index_head_dim
    if width % 64:
        yield f"config key index_head_dim = {width}: llama.cpp's {arch!r} needs a multiple of 64"


def square_heads(config: Config, arch: str) -> Iterator[str]:
    """A complaint when queries are wider or narrower than the stream, where the loader wants a square."""
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    if heads * width != hidden:
        yield (
            f"config keys num_attention_heads = {heads} and head_dim = {width}: llama.cpp's {arch!r} needs "
            f"heads of hidden_size = {hidden} in all"
        )


def dense_in_front(config: Config, arch: str) -> Iterator[str]:
    """A complaint when a dense layer follows one with experts."""
    kinds = list(getattr(config, "mlp_layer_types", None) or [])
    if "sparse" in kinds and set(kinds[kinds.index("sparse") :]) != {"sparse"}:
        yield f"config key mlp_layer_types: llama.cpp's {arch!r} has dense layers only before the others"
