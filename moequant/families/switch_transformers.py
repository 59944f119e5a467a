"""Switch Transformers: an encoder and a decoder of T5, whose sparse layers send a token to one expert of two.

The encoder's layers come first in the list, then the decoder's (`forward/joined.py`). Each has a table of
positions of its own there, which checkpoints store once for the encoder and once for the decoder. Of a row of
text the encoder reads the first half; the rest is the decoder's, which is scored on it.
"""

from __future__ import annotations

from dataclasses import replace

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Get, Slot
from moequant.values import ModelShape, Role, Site, Stack

POSITIONS = 512
"""Tokens that encoder and decoder were trained on; distances have no end."""


def shape(config: Config) -> ModelShape:
    """Layers of both, rows of both. FamilyError for a config without the tokens that rows are cut with."""
    for key in ("eos_token_id", "decoder_start_token_id"):
        token = getattr(config, key, None)
        token = config.pad_token_id if token is None and key == "decoder_start_token_id" else token
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise FamilyError(
                f"switch_transformers: config key {key} = {token!r}: one token of the vocabulary was expected"
            )
    return ModelShape(
        layers=int(config.num_layers) + int(config.num_decoder_layers),
        hidden=int(config.d_model),
        vocab=int(config.vocab_size),
        context=2 * int(getattr(config, "n_positions", None) or POSITIONS),
        heads=int(config.num_heads),
        kv_heads=int(config.num_heads),
        head_dim=int(config.d_kv),
        experts=int(config.num_experts),
        experts_used=1,
        tied=bool(config.tie_word_embeddings),
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """The embedding, which is the head as well, and the decoder's last norm."""
    site = Site("head.input", "model.scaled", "output")
    copies = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    ways = tuple(Get(f"{name}.weight") for name in copies)
    return (
        Slot("embedding", Role.EMBEDDING, "model.embed_tokens.weight", ways, site=site),
        Slot("norm", Role.NORM, "model.norm.weight", (Get("decoder.final_layer_norm.weight"),)),
    )


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """A layer of the encoder, or behind those one of the decoder."""
    first = int(config.num_layers)
    decodes = number >= first
    index, step = (
        (number - first, config.decoder_sparse_step) if decodes else (number, config.encoder_sparse_step)
    )
    stored = f"{'decoder' if decodes else 'encoder'}.block.{index}"
    sparse = step == 1 or (step > 0 and index % step == 1)
    block = _Block(number, f"model.layers.{number}.block", stored)
    last = 2 if decodes else 1
    table = f"{stored.rpartition('.')[0]}.0.layer.0.SelfAttention.relative_attention_bias.weight"
    positions = block.slot("positions", Role.POSITIONS, "layer.0.SelfAttention.relative_attention_bias")
    slots = [
        *block.attention("attn", "layer.0", "SelfAttention", Role.ATTN_OUT),
        replace(positions, get=(Get(table),)),
        *(block.attention("cross", "layer.1", "EncDecAttention", Role.CROSS_OUT) if decodes else ()),
        block.slot("ffn_norm", Role.NORM, f"layer.{last}.layer_norm"),
        *(block.experts(config, f"layer.{last}.mlp") if sparse else block.dense(f"layer.{last}.mlp")),
    ]
    if number == first - 1:
        param, norm = f"model.layers.{number}.norm.weight", "encoder.final_layer_norm.weight"
        slots.append(Slot(f"layers.{number}.final_norm", Role.NORM, param, (Get(norm),)))
    return tuple(slots)


class _Block:
    """The slots of a block: `number` in the list, `at` in the model, `stored` in checkpoints."""

    def __init__(self, number: int, at: str, stored: str) -> None:
        self.number, self.at, self.stored = number, at, stored

    def slot(self, name: str, role: Role, module: str, site: Site | None = None, adds: bool = False) -> Slot:
        """The weight of a module of the block."""
        get = (Get(f"{self.stored}.{module}.weight"),)
        own = f"layers.{self.number}.{name}"
        return Slot(own, role, f"{self.at}.{module}.weight", get, site=site, adds=adds)

    def site(self, name: str, module: str) -> Site:
        """The input of a module of the block."""
        return Site(f"layers.{self.number}.{name}", f"{self.at}.{module}")

    def attention(self, name: str, at: str, module: str, out: Role) -> tuple[Slot, ...]:
        """Attention to the block's own tokens, or to those of the encoder, whose keys and values are of what
        the encoder gives."""
        inside = f"{at}.{module}"
        into = self.site(f"{name}.input", f"{inside}.q")
        other = into if out is Role.ATTN_OUT else self.site(f"{name}.source", f"{inside}.k")
        # What goes wrong in front of cross attention is not seen there: it does not pull that back.
        adds = out is Role.ATTN_OUT
        return (
            self.slot(f"{name}_norm", Role.NORM, f"{at}.layer_norm"),
            self.slot(f"{name}_q", Role.ATTN_Q, f"{inside}.q", into),
            self.slot(f"{name}_k", Role.ATTN_K, f"{inside}.k", other),
            self.slot(f"{name}_v", Role.ATTN_V, f"{inside}.v", other),
            self.slot(f"{name}_out", out, f"{inside}.o", self.site(f"{name}.output", f"{inside}.o"), adds),
        )

    def dense(self, at: str) -> tuple[Slot, ...]:
        """A feed-forward block that every token crosses."""
        into, inner = self.site("ffn.input", f"{at}.wi"), self.site("ffn.inner", f"{at}.wo")
        return (
            self.slot("ffn.up", Role.DENSE_UP, f"{at}.wi", into),
            self.slot("ffn.down", Role.DENSE_DOWN, f"{at}.wo", inner, adds=True),
        )

    def experts(self, config: Config, at: str) -> tuple[Slot, ...]:
        """A router and experts of two products."""
        router = self.slot("router", Role.ROUTER, f"{at}.router.classifier")
        bias = f"{at}.router.classifier.bias"
        biased = Slot(f"{router.name}.bias", Role.BIAS, f"{self.at}.{bias}", (Get(f"{self.stored}.{bias}"),))
        return (
            router,
            *((biased,) if config.router_bias else ()),
            self._expert(Role.UP, f"{at}.experts", "wi", "up_proj"),
            self._expert(Role.DOWN, f"{at}.experts", "wo", "down_proj"),
        )

    def _expert(self, role: Role, at: str, stored: str, param: str) -> Slot:
        down, own = role is Role.DOWN, f"layers.{self.number}.experts"
        module = f"{self.at}.{at}"
        site = Site(f"{own}.inner", module, "inner") if down else Site(f"{own}.input", module, "experts")
        get = (Get(f"{self.stored}.{at}.expert_{{e}}.{stored}.weight"),)
        return Slot(f"{own}.{role.value}", role, f"{module}.{param}", get, (), site, Stack.EXPERTS, adds=down)


SWITCH_TRANSFORMERS = Family(
    name="switch_transformers",
    classes=("SwitchTransformersForConditionalGeneration",),
    model_type="switch_transformers",
    shape=shape,
    layer=layer,
    ends=ends,
    known=frozenset(
        {
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_decoder_layers",
            "num_heads",
            "num_experts",
            "expert_capacity",
            "encoder_sparse_step",
            "decoder_sparse_step",
            "num_sparse_encoder_layers",
            "num_sparse_decoder_layers",
            "layer_norm_epsilon",
            "dense_act_fn",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "router_bias",
            "decoder_start_token_id",
            "n_positions",
            # Of training, of generation, and of results that nobody asks for.
            "dropout_rate",
            "add_router_probs",
            "router_ignore_padding_tokens",
            "output_past",
            "task_specific_params",
        }
    ),
    says={
        "feed_forward_proj": ("relu",),
        "is_gated_act": (False,),
        "num_selected_experts": (1,),
        "router_type": ("tokens_masked",),
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
    },
    attention_gives=3,
)
