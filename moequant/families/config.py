"""What a config.json means: its class in transformers says, and every key is accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from moequant.errors import CheckpointError, FamilyError, foreign
from moequant.families.base import Config, Family
from moequant.values import Role, Stack

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "initializer_factor",
        "label2id",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "router_z_loss_coef",
        "sep_token_id",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "use_return_dict",
    }
)
"""Config keys that never change what inference computes, in any family: the one list of them."""

GENERATION = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
"""How text was to be generated: transformers 4 wrote these beside a model's own keys wherever a config held
another, and transformers 5 drops them. A class may have a key of its own under such a name."""

BOOKKEEPING = ("_", "unsloth")
"""Saving tools keep books under such names: `_attn_implementation_autoset`, `unsloth_version`."""

MOST_LAYERS = 10_000
"""Layers of a model, at most: more are a slip of the config, and would be listed and looped over."""

LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""What the classes in transformers call the number of layers."""

MOST_EXPERTS = 1 << 14
"""Experts of a layer, at most: where they are stored one by one, the names of all are listed."""

MOST = 1 << 20
"""Any other size of a model, at most: lists of so many numbers are made of them."""

_SIZES = re.compile(r"num_.+|n_(?!positions|ctx).+|d_.+|.+_(size|heads?|dim|rank|groups?|experts)")
"""Keys that say how many or how wide."""

_EXPERTS = re.compile(r"(.+_)?experts(_per_tok(en)?)?")
"""Those of them that count experts."""

_NOT_GIVEN = (
    "auto_map",
    "quantization_config",
    "model_type",
    "return_dict",
    "use_return_dict",
    "_attn_implementation",
    "_experts_implementation",
)
"""Keys that the class does not get: how the checkpoint is stored, another name for the class, and what is
ours to say when we run it: in which shape results come, and whose kernels compute them."""


def text_config(raw: Mapping[str, Any], hoisted: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """The part of a config.json that says how text is computed, with the keys `hoisted` from elsewhere; of a
    plain text model, all of it. Whether the head is tied, transformers asks the whole."""
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        return dict(raw)
    outer = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
    for part, key in hoisted:
        found = raw.get(part) if part else raw
        if isinstance(found, dict) and key in found:
            outer[key] = found[key]
    return {**inner, **outer}


def make_config(family: Family, raw: Mapping[str, Any], tied: bool | None = None) -> Config:
    """The config object of the family's class in transformers: absent keys filled, all keys checked.

    `tied` overrides `tie_word_embeddings`. Raises FamilyError for a value of a wrong type and for a key that
    nobody accounts for.
    """
    from transformers import CONFIG_MAPPING  # seconds to import, and `--help` does without

    text = text_config(raw, family.hoisted)
    # Releases of remote code have a name of their own for what is another model's class.
    told = text.get("model_type")
    kind = told if isinstance(told, str) and told in CONFIG_MAPPING else family.model_type
    if kind != family.model_type:
        raise FamilyError(
            f"config.json: model_type {kind!r} does not go with {family.classes[0]}, whose type is "
            f"{family.model_type!r}"
        )
    given = {key: _floats(value) for key, value in text.items() if key not in _NOT_GIVEN}
    _check_sizes(family, given)
    with foreign(FamilyError, f"config.json: {family.name} cannot be read from it"):
        given = family.dialect(given)
    if tied is not None:
        given["tie_word_embeddings"] = tied
    cls = CONFIG_MAPPING[family.model_type]
    with foreign(FamilyError, f"config.json: {family.model_type} cannot be made of it"):
        config = cls.from_dict(given)
    # As attention reads it; YaRN in transformers trips over None. Where layers are unlike, reading it raises.
    if vars(config).get("head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    _check_keys(family, given, config)
    _check_attention(family, config)
    return config


def _floats(value: Any) -> Any:
    """A value of a config.json where transformers has written {"__float__": "Infinity"} for what JSON has no
    word for."""
    if isinstance(value, dict):
        told = value.get("__float__")
        if told in ("Infinity", "-Infinity", "NaN"):
            return float(told)
        return {key: _floats(each) for key, each in value.items()}
    return [_floats(each) for each in value] if isinstance(value, list) else value


def _check_sizes(family: Family, given: Mapping[str, Any]) -> None:
    """FamilyError for a number of layers, heads or columns, before the class makes lists of that length."""
    for key, value in given.items():
        if isinstance(value, dict):
            _check_sizes(family, value)
        if not isinstance(value, int | float) or not _SIZES.fullmatch(key):
            continue
        if not value <= _most(key):  # so that NaN is too much as well
            raise FamilyError(f"{family.name}: config key {key} = {value}: more than any model has")


def _most(key: str) -> int:
    """What a key that says how many or how wide says at most."""
    if key in LAYERS:
        return MOST_LAYERS
    return MOST_EXPERTS if _EXPERTS.fullmatch(key) else MOST


def _check_keys(family: Family, given: Mapping[str, Any], config: Config) -> None:
    """FamilyError for the first key that may change what is computed and that nobody accounts for."""
    aliases = dict(getattr(type(config), "attribute_map", {}))
    known = family.known | HARMLESS
    known |= {aliases[key] for key in known if key in aliases} | {k for k, v in aliases.items() if v in known}
    cls: type = type(config)
    own, source = _defaults(cls), _model_source(cls)
    for key, value in given.items():
        if key in known or key.startswith(BOOKKEEPING) or value is None:
            continue
        if key in family.says:
            told = value if isinstance(value, list) and value else [value]  # of a list, every entry
            if value not in family.says[key] and any(one not in family.says[key] for one in told):
                raise _refused(family, key, value, f"this class computes {family.says[key][0]!r}")
        elif key in own or aliases.get(key, key) in own:
            default = own.get(key, own.get(aliases.get(key, key)))
            if value != default:
                raise _refused(family, key, value, f"only the class's own {default!r} is described")
        elif _mentions(source, key):
            raise _refused(family, key, value, "the class uses it, and no table describes it")
        elif value and key not in GENERATION:
            raise _refused(family, key, value, "unknown, and it may change what the model computes")
    for key, default in own.items():  # what the class derives, or reads under another name
        if key in known or key in given or aliases.get(key, key) in known:
            continue
        if (now := getattr(config, key, default)) != default:
            raise _refused(family, key, now, f"only the class's own {default!r} is described")


def _check_attention(family: Family, config: Config) -> None:
    """FamilyError where layers look back over no tokens, or where their kind has no rotation: transformers'
    classes take such a config, and fail when they compute."""
    cls: type = type(config)
    kinds = getattr(config, "layer_types", None)
    width = getattr(config, "sliding_window", None) if hasattr(cls, "sliding_window") else None
    if isinstance(width, int) and width < 1 and not _WINDOWED.isdisjoint(kinds or _WINDOWED):
        raise _refused(family, "sliding_window", width, "1 or more was expected, or null for no window")
    told, found = _defaults(cls).get("rope_parameters") or {}, getattr(config, "rope_parameters", None) or {}
    for kind in sorted({each for each in kinds or () if isinstance(told.get(each), Mapping)}):
        if not isinstance(found.get(kind), Mapping):
            why = f"one for each kind of layer was expected, and {kind!r} has none"
            raise _refused(family, "rope_parameters", found, why)


_WINDOWED = frozenset({"sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"})
"""Kinds of layers that look back over a window."""


def _refused(family: Family, key: str, value: Any, why: str) -> FamilyError:
    shown = repr(value)
    shown = shown if len(shown) < 80 else shown[:79] + "…"
    return FamilyError(f"{family.name}: config key {key} = {shown}: {why}")


@cache
def _defaults(cls: type) -> dict[str, Any]:
    """Every key of a config class, with the value that it has when nobody says."""
    from transformers import PreTrainedConfig

    base = PreTrainedConfig().to_dict()
    made = cls().to_dict()
    return {key: value for key, value in made.items() if key not in base or value != base[key]}


@cache
def _model_source(cls: type) -> str:
    """The source of the model that a config class belongs to, and of the masks that all models share; it is
    read, and not imported, which takes seconds."""
    module = cls.__module__.replace(".configuration_", ".modeling_")
    return _source(module) + _source("transformers.masking_utils")


def _source(module: str) -> str:
    """The source of a module; of one that has none, nothing."""
    try:
        loader: Any = getattr(find_spec(module), "loader", None)
        return loader.get_source(module) or ""
    except (ImportError, AttributeError):
        return ""


def _mentions(source: str, key: str) -> bool:
    return f"config.{key}" in source or f'"{key}"' in source


def one_by_one(family: Family, config: Config) -> bool:
    """Whether experts have names one by one, as readers of quantized folders look for them."""
    layers = (family.layer(config, number) for number in range(config.num_hidden_layers))
    experts = (slot for layer in layers for slot in layer if slot.stack is Stack.EXPERTS)
    return all("{e}" in slot.ways[0].name for slot in experts)


SHARED = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
"""What shared experts are made of."""


OWN_WIDTH = "moe_shared_expert_intermediate_size"
"""How wide shared experts are together, in classes that know this key; no number of them counts there."""


def no_shared(config: Config) -> str | None:
    """The config key that says that there are no shared experts, of a class that knows them; None where there
    are some."""
    keys = ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size")
    own = (OWN_WIDTH,) if getattr(type(config), OWN_WIDTH, None) is not None else keys
    return next((key for key in own if getattr(config, key, None) == 0), None)


def check_experts(family: Family, experts: int, used: int) -> None:
    """CheckpointError when a token is to be sent to more experts than there are."""
    if experts and not 0 < used <= experts:
        raise CheckpointError(
            f"{family.name}: num_experts_per_tok is {used}, but there are {experts} experts; a token "
            f"can be sent to 1 to {experts} of them"
        )


def check_groups(family: Family, config: Config, experts: int, used: int) -> None:
    """CheckpointError when experts are chosen out of groups, and the groups do not hold them.

    For configs that say both how many groups there are and how many are chosen; a class that has a number of
    its own for them fails where the config says null.
    """
    limited = getattr(config, "topk_method", None) == "group_limited_greedy"
    keys = [
        key for key in ("n_group", "topk_group") if limited or getattr(type(config), key, None) is not None
    ]
    if experts and (null := next((key for key in keys if getattr(config, key) is None), None)):
        raise CheckpointError(
            f"{family.name}: {null} is null, but this class counts groups of experts; 1 is for none"
        )
    groups, chosen = (getattr(config, key, None) for key in ("n_group", "topk_group"))
    if groups is None or chosen is None or not experts or (groups, chosen) == (1, 1):
        return
    if groups < 1 or experts % groups or experts // groups < 2:
        raise CheckpointError(
            f"{family.name}: n_group is {groups}, but there are {experts} experts; groups of as many each, "
            "of 2 or more, were expected"
        )
    within = experts // groups
    least = -(-used // within)
    if not least <= chosen <= groups:
        raise CheckpointError(
            f"{family.name}: topk_group is {chosen}, of {groups} groups of {within} experts; {least} to "
            f"{groups} were expected, for tokens that are sent to {used} experts"
        )
