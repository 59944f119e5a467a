"""Dense Llama and Mistral: no experts to win anything on, converted all the same."""

from moequant.families.base import SHAPE_KEYS, Family, attention, dense_ffn, ends

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf_arch="llama",
    rules=(*ends(), *attention(rope=True), *dense_ffn()),
    keys=SHAPE_KEYS,
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (None,),
    },
    ignored=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
)
