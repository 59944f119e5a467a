"""Qwen3-MoE: per-head q/k norms; llama.cpp always renormalises the top-k weights and has no dense layers."""

from moequant.families.base import SHAPE_KEYS, Family, Key, attention, ends, experts

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf_arch="qwen3moe",
    rules=(
        *ends(),
        *attention(qk_norm=True),
        *experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    keys=(
        *SHAPE_KEYS,
        Key("num_experts", "expert_count", "u32"),
        Key("num_experts_per_tok", "expert_used_count", "u32", default=8),
        Key("moe_intermediate_size", "expert_feed_forward_length", "u32", default=768),
    ),
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": (None,),
        "use_sliding_window": (False,),
    },
    experts_key="num_experts",
)
