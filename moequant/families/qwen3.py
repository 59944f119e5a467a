"""Dense Qwen3: Qwen3-MoE without the experts."""

from moequant.families.base import SHAPE_KEYS, Family, attention, dense_ffn, ends

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf_arch="qwen3",
    rules=(*ends(), *attention(qk_norm=True), *dense_ffn()),
    keys=SHAPE_KEYS,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "layer_types": (None, "full_attention"),
    },
)
