"""OLMoE: q/k norms over all heads; llama.cpp neither renormalises top-k weights nor clips q, k, v."""

from moequant.families.base import SHAPE_KEYS, Family, Key, attention, ends, experts

OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    gguf_arch="olmoe",
    rules=(
        *ends(),
        *attention(qk_norm=True),
        *experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    keys=(
        *SHAPE_KEYS,
        Key("num_experts", "expert_count", "u32", default=64),
        Key("num_experts_per_tok", "expert_used_count", "u32", default=8),
    ),
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "norm_topk_prob": (False,),
        "clip_qkv": (None,),
    },
    experts_key="num_experts",
)
