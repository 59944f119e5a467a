"""llama.cpp's `deepseek2`: latent attention with the keys' half of kv_b absorbed into the queries.

DeepSeek-V2 and V3, Kimi-K2 and K2.5, GLM-4.7-Flash; `mistral4` is the same graph under another name.
"""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.attention_scale import scales, unscaled
from moequant.containers.gguf.families.base import (
    DRAFTING,
    Export,
    FileTensor,
    Key,
    dense_in_front,
    only,
    other_epsilon,
)
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    SOFTMAX,
    head_dim,
    leading_dense,
    rope,
    rotated_part,
    routing,
    sizes,
)
from moequant.families import Config
from moequant.families.mla import query_module
from moequant.values import Role, Site, Stack, Weight
from moequant.values.ops import Joined, Part, Stacked, Transposed

ARCH, MISTRAL = "deepseek2", "mistral4"


def split_latent(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """kv_b [H·(nope + v), r] as k_b [H, r, nope], fed by the unrotated part of the queries, and v_b [H·v, r],
    fed by the latent."""
    if weight.role is not Role.KV_B:
        return None
    assert weight.site is not None
    heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rank = config.kv_lora_rank
    queries = Site(
        weight.site.name.replace("attn.latent", "attn.q_nope"),
        weight.site.module.replace("self_attn.kv_b_proj", query_module(config)),
        "output",
        (Stacked(heads, axis=-1), Part(0, nope, axis=-1)),
        heads=True,
    )
    keys = (Stacked(heads), Part(0, nope), Transposed())
    values = (Stacked(heads), Part(nope, nope + v), Joined())
    return (
        FileTensor("attn_k_b.weight", keys, "attn_k_b", Role.K_B, queries, Stack.HEADS),
        FileTensor("attn_v_b.weight", values, "attn_v_b", Role.V_B, shape=(heads, v, rank)),
    )


def latent_keys(config: Config, arch: str) -> tuple[Key, ...]:
    """Sizes of latent attention, and its rotation; how much that is scaled is said by `scales`."""
    found = config.rope_parameters or {}
    ours = ("attention_factor", "mscale", "mscale_all_dim")
    turned = {key: value for key, value in found.items() if key not in ours}
    return (*latent_sizes(config), *rope(config, turned), *scales(config, arch))


def latent_sizes(config: Config) -> tuple[Key, ...]:
    """Sizes of latent attention. llama.cpp sees one key head, as wide as the latent and the rotated part."""
    rank, rotated = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    queries = (
        [] if config.q_lora_rank is None else [Key("attention.q_lora_rank", "u32", int(config.q_lora_rank))]
    )
    return (
        *queries,
        Key("attention.kv_lora_rank", "u32", rank),
        Key("attention.key_length", "u32", rank + rotated),
        Key("attention.value_length", "u32", rank),
        Key("attention.key_length_mla", "u32", int(config.qk_nope_head_dim) + rotated),
        Key("attention.value_length_mla", "u32", int(config.v_head_dim)),
        Key("rope.dimension_count", "u32", rotated),
    )


def one_key_head(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """The sizes with the number of key heads that llama.cpp sees."""
    return tuple(Key(k.name, k.kind, 1) if k.name == "attention.head_count_kv" else k for k in keys)


def v2_keys(config: Config, arch: str = ARCH) -> tuple[Key, ...]:
    """Keys of DeepSeek-V2. Its class never renormalises the weights of the chosen experts."""
    router = routing(config, SOFTMAX, int(config.first_k_dense_replace), _limited(config))
    return (*one_key_head(sizes(config)), *router, *latent_keys(config, arch))


def _limited(config: Config) -> bool:
    """Whether experts are chosen out of the best groups alone, whatever number of groups is said."""
    return getattr(config, "topk_method", "group_limited_greedy") == "group_limited_greedy"


def v3_keys(config: Config) -> tuple[Key, ...]:
    """Keys of DeepSeek-V3."""
    router = routing(config, SIGMOID, int(config.first_k_dense_replace))
    return (*one_key_head(sizes(config)), *router, *latent_keys(config, ARCH))


def glm_keys(config: Config) -> tuple[Key, ...]:
    """Keys of GLM-4.7-Flash."""
    router = routing(config, SIGMOID, leading_dense(config))
    return (*one_key_head(sizes(config)), *router, *latent_keys(config, ARCH))


def mistral_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Mistral 4, whose queries grow with the logarithm of the position."""
    found = config.rope_parameters or {}
    scaled = (
        (
            Key("attention.temperature_scale", "f32", float(found["llama_4_scaling_beta"])),
            Key("attention.temperature_length", "u32", int(found["original_max_position_embeddings"])),
        )
        if found.get("llama_4_scaling_beta")
        else ()
    )
    return (*v2_keys(config, MISTRAL), *scaled)


def latent_complaints(config: Config, arch: str) -> Iterator[str]:
    """What graphs of latent attention take for granted."""
    yield from only(config, arch, "hidden_act", "silu")
    yield from only(config, arch, "attention_bias", False)
    yield from only(config, arch, "rope_interleave", True)
    yield from dense_in_front(config, arch)
    width = head_dim(config)
    if (rotated := int(width * rotated_part(config))) != config.qk_rope_head_dim:
        yield (
            f"rope parameter partial_rotary_factor = {rotated_part(config):g}, of head_dim = {width}: "
            f"{rotated} dimensions would be rotated; llama.cpp's {arch!r} rotates all of qk_rope_head_dim = "
            f"{config.qk_rope_head_dim}"
        )
    yield from unscaled(config, arch)


def complaints(config: Config, arch: str = ARCH) -> Iterator[str]:
    """What `deepseek2` takes for granted."""
    yield from latent_complaints(config, arch)
    lite = config.num_hidden_layers in (26, 27)
    lite |= config.num_hidden_layers == 48 and config.vocab_size == 128256
    if lite != (config.q_lora_rank is None):
        yield (
            f"config key q_lora_rank = {config.q_lora_rank!r}: llama.cpp's {arch!r} takes queries without a "
            "latent in models of 26 or 27 layers, or of 48 and 128256 tokens, and only there"
        )


def mistral_complaints(config: Config) -> Iterator[str]:
    """What `mistral4` takes for granted."""
    yield from complaints(config, MISTRAL)
    found = config.rope_parameters or {}
    if found.get("llama_4_scaling_beta") and not found.get("original_max_position_embeddings"):
        yield "rope parameter llama_4_scaling_beta needs original_max_position_embeddings"


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    return other_epsilon(config, "the latents of attention")


def v2_warnings(config: Config) -> tuple[str, ...]:
    """The same, and how groups of experts are chosen."""
    if not _limited(config) or (config.n_group or 1) == (config.topk_group or 1):
        return warnings(config)
    return (
        *warnings(config),
        "llama.cpp chooses a group of experts by the sum of its two best scores, DeepSeek-V2 by its best "
        "score: some tokens go to other experts",
    )


DEEPSEEK_V2 = Export(ARCH, v2_keys, complaints, cut=split_latent, warnings=v2_warnings)
DEEPSEEK_V3 = Export(ARCH, v3_keys, complaints, cut=split_latent, warnings=warnings, drafting=DRAFTING)
GLM4_MOE_LITE = Export(ARCH, glm_keys, complaints, cut=split_latent, warnings=warnings, drafting=DRAFTING)
MISTRAL4 = Export(MISTRAL, mistral_keys, mistral_complaints, cut=split_latent, warnings=warnings)
