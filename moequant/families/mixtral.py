"""Mixtral: llama attention with interleaved rotary rows, experts named w1 (gate), w3 (up), w2 (down)."""

from moequant.families.base import SHAPE_KEYS, Family, Key, attention, ends, experts

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf_arch="llama",
    rules=(
        *ends(),
        *attention(rope=True),
        *experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    keys=(
        *SHAPE_KEYS,
        Key("num_local_experts", "expert_count", "u32"),
        Key("num_experts_per_tok", "expert_used_count", "u32", default=2),
    ),
    fixed={"hidden_act": ("silu",), "sliding_window": (None,), "attention_bias": (False,)},
    experts_key="num_local_experts",
)
