"""Keys that families share: sizes, rotary positions, experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moequant.containers.gguf.families.base import Computed, Key, Unsayable
from moequant.errors import FamilyError, few
from moequant.families import Config

_SCALING = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "partial_rotary_factor",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "mrope_section",
        "mrope_interleaved",
        "llama_4_scaling_beta",
        "max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    }
)


def sizes(config: Config) -> tuple[Key, ...]:
    """Shape and norm keys that every llama-like architecture reads; of a model without dense layers, not
    their width."""
    heads, width = int(config.num_attention_heads), getattr(config, "intermediate_size", None)
    eps = getattr(config, "rms_norm_eps", None)
    return (
        Key("context_length", "u32", int(config.max_position_embeddings)),
        Key("embedding_length", "u32", int(config.hidden_size)),
        Key("block_count", "u32", int(config.num_hidden_layers)),
        *([] if width is None else [Key("feed_forward_length", "u32", int(width))]),
        Key("attention.head_count", "u32", heads),
        Key("attention.head_count_kv", "u32", int(getattr(config, "num_key_value_heads", None) or heads)),
        *([] if eps is None else [Key("attention.layer_norm_rms_epsilon", "f32", float(eps))]),
        Key("vocab_size", "u32", int(config.vocab_size)),
    )


def instead(keys: tuple[Key, ...], *others: Key) -> tuple[Key, ...]:
    """The keys, with `others` in place of those of their names."""
    named = {key.name for key in others}
    return (*(key for key in keys if key.name not in named), *others)


def expert_counts(config: Config) -> tuple[Key, ...]:
    """How many experts there are, and how many a token is sent to."""
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return (
        Key("expert_count", "u32", int(count)),
        Key("expert_used_count", "u32", int(config.num_experts_per_tok)),
    )


SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers of how a router scores."""


def experts(config: Config, width: int, shared: int = 0) -> tuple[Key, ...]:
    """Counts and widths: `width` of a routed expert, `shared` of the shared ones together."""
    return (
        *expert_counts(config),
        Key("expert_feed_forward_length", "u32", int(width)),
        *([Key("expert_shared_feed_forward_length", "u32", int(shared))] if shared else []),
    )


def scoring(gating: int, normalised: bool, scale: float = 1.0) -> tuple[Key, ...]:
    """How a router scores, whether the weights of the chosen experts sum to one, and what multiplies
    them."""
    return (
        Key("expert_gating_func", "u32", gating),
        Key("expert_weights_norm", "bool", bool(normalised)),
        Key("expert_weights_scale", "f32", float(scale)),
    )


def groups(config: Config, limited: bool = True) -> tuple[Key, ...]:
    """Experts are chosen out of the best groups of them; where all groups are the best, or choice is not
    `limited` to some, there is one. llama.cpp takes no file in which all of several are, and none with as
    many groups as experts: one expert is in no group."""
    if expert_counts(config)[0].value == 1:
        return ()
    found, best = int(config.n_group or 1), int(config.topk_group or 1)
    if not limited or best >= found:
        found = best = 1
    return (Key("expert_group_count", "u32", found), Key("expert_group_used_count", "u32", best))


def leading_dense(config: Config) -> int:
    """How many layers before the first with experts."""
    kinds = list(config.mlp_layer_types)
    return kinds.index("sparse") if "sparse" in kinds else len(kinds)


def window(config: Config) -> Key:
    """How far layers with a window look back. FamilyError where the config does not say it."""
    width = config.sliding_window
    if width is None:
        raise FamilyError("config key sliding_window is None, but layer_types has layers with a window")
    return Key("attention.sliding_window", "u32", int(width))


def windows(config: Config) -> tuple[Key, ...]:
    """How far layers look back, and which of them look only so far; nothing where all look at everything."""
    short = [kind == "sliding_attention" for kind in config.layer_types]
    return (window(config), Key("attention.sliding_window_pattern", "bools", short)) if any(short) else ()


def routing(config: Config, gating: int, dense: int, limited: bool = True) -> tuple[Key, ...]:
    """How DeepSeek's routers score, group and scale, and what is beside the routed experts: `dense` layers
    in front, shared experts."""
    return (
        *experts(config, config.moe_intermediate_size),
        *scoring(gating, config.norm_topk_prob, config.routed_scaling_factor),
        *groups(config, limited),
        Key("leading_dense_block_count", "u32", dense),
        Key("expert_shared_count", "u32", int(config.n_shared_experts)),
    )


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def head_widths(config: Config, rotated: float = 1.0) -> tuple[Key, ...]:
    """Width of heads, and of the share of them that is rotated."""
    width = head_dim(config)
    turned = int(width * rotated)
    if turned % 2:
        raise FamilyError(
            f"rope parameter partial_rotary_factor = {rotated:g}: {turned} of {width} dimensions of a head "
            "would be rotated; llama.cpp rotates pairs"
        )
    return (
        Key("rope.dimension_count", "u32", turned),
        Key("attention.key_length", "u32", width),
        Key("attention.value_length", "u32", width),
    )


def head_sizes(config: Config, rotated: float = 1.0, in_tensors: tuple[str, ...] = ()) -> tuple[Key, ...]:
    """The same, with the base of the rotation and its scaling; see `rope`."""
    return (*head_widths(config, rotated), *rope(config, in_tensors=in_tensors))


def rope_sections(config: Config, rotated: int) -> Key:
    """Which of the rotated frequencies turn with time, height and width, one after the other: all of them. Of
    text, all three are the same position, and those that llama.cpp finds in no section do not turn."""
    turned = [len(range(axis, rotated // 2, 3)) for axis in range(3)]
    return Key("rope.dimension_sections", "u32s", [*turned, 0])


def turned_by_time(config: Config, rotated: int, default: tuple[int, ...]) -> tuple[str, ...]:
    """A warning about frequencies behind the config's sections, which transformers turns with time."""
    found = tuple((config.rope_parameters or {}).get("mrope_section") or default)
    if len(found) < 3:
        raise FamilyError(f"rope parameter mrope_section = {list(found)}: three numbers were expected")
    behind = [i for i in range(rotated // 2) if i % 3 and i >= 3 * found[i % 3]]
    if not behind:
        return ()
    return (
        f"in pictures, llama.cpp turns rotary frequencies {few(behind)} of {rotated // 2} with height and "
        "width, transformers with time: no part of mrope_section covers them. Text is the same",
    )


def rotated_part(config: Config) -> float:
    """The share of each head that is rotated, for classes that read it."""
    return float((config.rope_parameters or {}).get("partial_rotary_factor") or 1.0)


LLAMA3, LONG = "llama3", "longrope"
"""Scalings by numbers of each frequency, which files have in tensors."""


def rope(
    config: Config, parameters: Mapping[str, Any] | None = None, in_tensors: tuple[str, ...] = ()
) -> tuple[Key, ...]:
    """Base and scaling of rotary positions, by the config's `rope_parameters` unless others are given.

    `in_tensors` are scalings of which the family also writes `rope_factors`. A dynamic scaling does nothing
    within the context of the model.

    Raises Unsayable for a scaling that GGUF cannot express or that is not known here, FamilyError for one
    that transformers does not know either.
    """
    found = dict((config.rope_parameters if parameters is None else parameters) or {})
    kind = found.get("rope_type", "default")
    known = ("default", "dynamic", "linear", "yarn", *in_tensors)
    if kind not in known:
        raise (Unsayable if _is_computed(kind) else FamilyError)(
            f"config key rope_parameters, or rope_scaling: llama.cpp has no rope type {kind!r} for this "
            f"family; there are {', '.join(known)}"
        )
    if unknown := sorted(str(key) for key in found.keys() - _SCALING - (_LISTS if kind == LONG else set())):
        raise Unsayable(f"rope scaling {kind!r}: no key of GGUF is known for {unknown[0]}")
    if kind == "yarn" and not found.get("truncate", True):
        raise Unsayable(
            "rope scaling 'yarn': truncate is false: llama.cpp rounds the bounds to whole dimensions, so the "
            "file would compute something else"
        )
    base = Key("rope.freq_base", "f32", _number(found, "rope_theta", kind))
    if kind in ("default", "dynamic", LLAMA3):
        return (base,)
    if kind == LONG:
        return (base, *_long(config, found))
    factor = _number(found, "factor", kind)
    keys = [base, Key("rope.scaling.type", "str", kind), Key("rope.scaling.factor", "f32", factor)]
    return (*keys, *(_yarn(config, found, factor) if kind == "yarn" else ()))


def _is_computed(kind: str) -> bool:
    """Whether transformers knows that type of scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # only when something is refused

    return kind in ROPE_INIT_FUNCTIONS


def rope_factors(
    config: Config,
    parameters: Mapping[str, Any] | None = None,
    rotated: int | None = None,
    length: int | None = None,
) -> tuple[Computed, ...]:
    """What divides each frequency, for scalings that llama.cpp has no keys for: Llama 3.1's and LongRoPE's.

    By the config's `rope_parameters` and all of each head, unless others and `rotated` dimensions are given;
    up to `length`, nothing is divided.
    """
    found = dict((config.rope_parameters if parameters is None else parameters) or {})
    if found.get("rope_type") == LONG:
        names = {"long": "long_factor", "short": "short_factor"}
        return tuple(
            Computed(f"rope_factors_{name}.weight", _list(config, found, key)) for name, key in names.items()
        )
    if found.get("rope_type") != LLAMA3:
        return ()
    numbers = (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    base, factor, low, high, context = (_number(found, name, LLAMA3) for name in numbers)
    width = head_dim(config) if rotated is None else rotated
    factors = []
    for at in range(0, width, 2):
        turns = context / (2 * math.pi * base ** (at / width))  # in the context of the training
        # Where both are one number, as in Llama 4 Scout, there is nothing between them.
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0) if high > low else float(turns >= low)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    factors += [1.0] * ((length or 0) - len(factors))
    return (Computed("rope_freqs.weight", tuple(factors)),)


def _yarn(config: Config, found: Mapping[str, Any], factor: float) -> tuple[Key, ...]:
    original = found.get("original_max_position_embeddings") or config.max_position_embeddings
    keys = [Key("rope.scaling.original_context_length", "u32", int(original))]
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if found.get(name) is not None:
            keys.append(Key(f"rope.scaling.{key}", "f32", float(found[name])))
    if found.get("attention_factor") is not None or (found.get("mscale") and found.get("mscale_all_dim")):
        # llama.cpp multiplies its own factor by this key (it reads yarn_attn_factor, and then forgets it).
        keys.append(Key("rope.scaling.attn_factor", "f32", yarn_factor(found, factor) / grown(factor)))
    return tuple(keys)


_LISTS = frozenset({"long_factor", "short_factor"})
"""What LongRoPE divides each frequency by, in long texts and in short ones."""


def _long(config: Config, found: Mapping[str, Any]) -> tuple[Key, ...]:
    """Keys of LongRoPE; the numbers of its frequencies are in tensors."""
    for name in sorted(_LISTS):
        _list(config, found, name)
    context = int(_number(found, "original_max_position_embeddings", LONG))
    factor, scale = found.get("factor") or config.max_position_embeddings / context, 1.0
    if found.get("attention_factor") is not None:
        scale = _number(found, "attention_factor", LONG)
    elif factor > 1:
        scale = math.sqrt(1 + math.log(factor) / math.log(context))
    return (
        Key("rope.scaling.type", "str", LONG),
        Key("rope.scaling.original_context_length", "u32", context),
        Key("rope.scaling.attn_factor", "f32", scale),
    )


def _list(config: Config, found: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """One number for each pair of rotated dimensions."""
    values, pairs = found.get(name), head_dim(config) // 2
    if not isinstance(values, list | tuple) or len(values) != pairs:
        shown = f"{len(values)} numbers" if isinstance(values, list | tuple) else repr(values)
        raise FamilyError(f"rope scaling {LONG!r}: {name} is {shown}; {pairs} numbers were expected")
    return tuple(_number({name: value}, name, LONG) for value in values)


def yarn_factor(found: Mapping[str, Any], factor: float) -> float:
    """What transformers multiplies rotated queries, and keys, by: YaRN's own factor, unless another is
    said."""
    if (said := found.get("attention_factor")) is not None:
        return float(said)
    if found.get("mscale") and found.get("mscale_all_dim"):
        return grown(factor, found["mscale"]) / grown(factor, found["mscale_all_dim"])
    return grown(factor)


def grown(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by in a context that is `factor` times as long."""
    return 1.0 + 0.1 * scale * math.log(factor) if factor > 1 else 1.0


def _number(found: Mapping[str, Any], name: str, kind: str) -> float:
    value = found.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise FamilyError(f"rope scaling {kind!r}: {name} is {value!r}; a number above 0 was expected")
    return float(value)
