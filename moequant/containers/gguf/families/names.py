"""GGUF's names of tensors, by our names of weights within a layer."""

from __future__ import annotations

from collections.abc import Mapping


def _both(ours: str, theirs: str) -> dict[str, str]:
    """A linear's weight and bias."""
    return {ours: f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}


COMMON: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    **_both("norm", "output_norm"),
    **_both("head", "output"),
    **_both("attn_norm", "attn_norm"),
    **_both("attn_q", "attn_q"),
    **_both("attn_k", "attn_k"),
    **_both("attn_v", "attn_v"),
    **_both("attn_qkv", "attn_qkv"),
    **_both("attn_out", "attn_output"),
    **_both("attn_gate", "attn_gate"),
    "nextn.join": "nextn.eh_proj.weight",
    "nextn.embedding_norm": "nextn.enorm.weight",
    "nextn.hidden_norm": "nextn.hnorm.weight",
    "nextn.embedding": "nextn.embed_tokens.weight",
    "nextn.norm": "nextn.shared_head_norm.weight",
    "nextn.head": "nextn.shared_head_head.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
    "attn_q_norm": "attn_q_norm.weight",
    "attn_k_norm": "attn_k_norm.weight",
    "attn_sinks": "attn_sinks.weight",
    "attn_q_a": "attn_q_a.weight",
    "attn_q_a_norm": "attn_q_a_norm.weight",
    "attn_q_b": "attn_q_b.weight",
    "attn_kv_a": "attn_kv_a_mqa.weight",
    "attn_kv_a_norm": "attn_kv_a_norm.weight",
    "ssm.alpha": "ssm_alpha.weight",
    "ssm.beta": "ssm_beta.weight",
    "ssm.ba": "ssm_ba.weight",
    "indexer.q_b": "indexer.attn_q_b.weight",
    "indexer.k": "indexer.attn_k.weight",
    "indexer.weights": "indexer.proj.weight",
    **_both("indexer.k_norm", "indexer.k_norm"),
    **_both("ssm.in", "ssm_in"),
    **_both("ssm.conv", "ssm_conv1d"),
    "ssm.dt": "ssm_dt.bias",
    "ssm.a": "ssm_a",
    "ssm.d": "ssm_d",
    "ssm.norm": "ssm_norm.weight",
    **_both("ssm.out", "ssm_out"),
    **_both("conv.in", "shortconv.in_proj"),
    "conv": "shortconv.conv.weight",
    **_both("conv.out", "shortconv.out_proj"),
    **_both("ffn_norm", "ffn_norm"),
    **_both("ffn.gate", "ffn_gate"),
    **_both("ffn.up", "ffn_up"),
    **_both("ffn.down", "ffn_down"),
    **_both("router", "ffn_gate_inp"),
    "router.correction": "exp_probs_b.bias",
    "latent.down": "ffn_latent_down.weight",
    "latent.up": "ffn_latent_up.weight",
    "router.scale": "ffn_gate_inp.scale",
    **_both("experts.gate", "ffn_gate_exps"),
    **_both("experts.up", "ffn_up_exps"),
    **_both("experts.down", "ffn_down_exps"),
    "experts.scale": "ffn_down_exps.scale",
    "shared.router": "ffn_gate_inp_shexp.weight",
    **_both("shared.gate", "ffn_gate_shexp"),
    **_both("shared.up", "ffn_up_shexp"),
    **_both("shared.down", "ffn_down_shexp"),
}
