"""Model families as tables: find one, read its config, name its tensors."""

from __future__ import annotations

from typing import Any

from moequant.errors import FamilyError
from moequant.families.base import HARMLESS, Config, Family, Part, Rule
from moequant.families.llama import LLAMA
from moequant.families.mixtral import MIXTRAL
from moequant.families.olmoe import OLMOE
from moequant.families.qwen3 import QWEN3
from moequant.families.qwen3_moe import QWEN3_MOE
from moequant.families.rope import ROPE_CONFIG_KEYS, rope_metadata

__all__ = ["FAMILIES", "Config", "Family", "Part", "Rule", "find", "metadata", "normalized"]

FAMILIES: tuple[Family, ...] = (MIXTRAL, QWEN3_MOE, OLMOE, LLAMA, QWEN3)

_ALIASES = {"num_local_experts": "num_experts", "num_experts": "num_local_experts"}
"""transformers writes the number of experts under either name, depending on its version."""


def find(config: Config) -> Family:
    """The family of a `config.json`; FamilyError names the architecture when there is none."""
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise FamilyError(
        f"architecture {'/'.join(map(str, architectures)) or '(none in config.json)'} is not supported yet; "
        f"supported: {known}"
    )


def normalized(family: Family, config: Config) -> dict[str, Any]:
    """The config with aliases resolved and defaults filled in, every key accounted for.

    Raises FamilyError for a key that no table names, for a value that the runtime does not
    implement, and for a key that is missing and has no default.
    """
    full = dict(config)
    wanted = {key.config for key in family.keys}
    for alias, name in _ALIASES.items():
        if alias in full and alias not in wanted and name in wanted:
            full.setdefault(name, full.pop(alias))
            full.pop(alias, None)
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full.get("num_attention_heads")
    for key in family.keys:
        if full.get(key.config) is None:
            if key.default is None:
                raise FamilyError(f"config.json lacks {key.config!r}, which {family.name} needs")
            full[key.config] = key.default
    for name, allowed in family.fixed.items():
        values = full[name] if isinstance(full.get(name), list) else [full.get(name, allowed[0])]
        if any(value not in allowed for value in values) and not _unused_window(name, full):
            raise FamilyError(
                f"config key {name} = {full[name]!r}: llama.cpp's {family.gguf_arch!r} implements only "
                f"{' or '.join(map(repr, allowed))}, the file would compute something else"
            )
    known = wanted | family.fixed.keys() | HARMLESS | ROPE_CONFIG_KEYS
    unknown = sorted(key for key in full.keys() - known if full[key] is not None)
    if unknown:
        raise FamilyError(
            f"{family.name}: config key {unknown[0]} = {full[unknown[0]]!r} is unknown and may change "
            "what the model computes" + (f" (also {', '.join(unknown[1:])})" if unknown[1:] else "")
        )
    return full


def metadata(family: Family, config: Config) -> list[tuple[str, str, Any]]:
    """The `{arch}.*` GGUF keys of a normalized config, as (key, kind, value)."""
    pairs = [(key, config[key.config]) for key in family.keys]
    return [
        *((f"{family.gguf_arch}.{key.gguf}", key.kind, value) for key, value in pairs),
        *((f"{family.gguf_arch}.{name}", kind, value) for name, kind, value in rope_metadata(config)),
    ]


def _unused_window(name: str, config: Config) -> bool:
    """A sliding window that is switched off, or that no context ever exceeds, changes nothing."""
    if name != "sliding_window":
        return False
    off = config.get("use_sliding_window") is False
    return off or config["sliding_window"] >= config["max_position_embeddings"]
