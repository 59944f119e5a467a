"""Blocks that families share, as the slots of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moequant.families.base import Config, Get, Slot
from moequant.values import ModelShape, Role, Site, Stack
from moequant.values.ops import Op, Ops, Part, Transposed

SHAPE_KEYS = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "vocab_size",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "layer_types",
    }
)
"""Config keys that every llama-like family has, and every container looks at."""


def shape(config: Config, experts: int = 0, used: int = 0) -> ModelShape:
    """The shape of a llama-like model."""
    heads = int(config.num_attention_heads)
    return ModelShape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        experts=experts,
        experts_used=used,
        tied=bool(config.tie_word_embeddings),
    )


def moe_shape(config: Config) -> ModelShape:
    """The same with experts, which transformers knows as `num_local_experts` or `num_experts`."""
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return shape(config, int(experts), int(config.num_experts_per_tok))


def ends(config: Config, final: str = "model.norm", embedded: str = "model.embed_tokens") -> tuple[Slot, ...]:
    """Embedding, `final` norm and head. The head's input is seen where it is made, so that nobody computes
    logits to see it. Of a tied pair checkpoints may hold either one."""
    embedding, head = f"{embedded}.weight", "lm_head.weight"
    site = Site("head.input", final, "output")
    return (
        Slot(
            "embedding",
            Role.EMBEDDING,
            embedding,
            (Get(embedding), Get(head)) if config.tie_word_embeddings else (),
            site=site if config.tie_word_embeddings else None,
        ),
        Slot("norm", Role.NORM, f"{final}.weight"),
        Slot("head", Role.OUTPUT, head, site=site, optional=bool(config.tie_word_embeddings)),
    )


def norm(layer: int, name: str, module: str) -> Slot:
    """A norm's weight; `module` is its name within the layer."""
    return Slot(f"layers.{layer}.{name}", Role.NORM, f"model.layers.{layer}.{module}.weight")


def bias(slot: str, module: str) -> Slot:
    """The bias of a slot's module, where there is one."""
    return Slot(f"{slot}.bias", Role.BIAS, f"{module}.bias", optional=True)


def linear(
    layer: int, name: str, role: Role, module: str, site: Site, *, biased: bool = False, adds: bool = False
) -> tuple[Slot, ...]:
    """A linear module's weight, and its bias if it may have one; `module` is its name within the layer."""
    own, at = f"layers.{layer}.{name}", f"model.layers.{layer}.{module}"
    slot = Slot(own, role, f"{at}.weight", site=site, adds=adds)
    return (slot, bias(own, at)) if biased else (slot,)


def seen(layer: int, name: str, module: str) -> Site:
    """The input of a module of a layer."""
    return Site(f"layers.{layer}.{name}", f"model.layers.{layer}.{module}")


def attention(
    layer: int,
    *,
    qk_norm: bool = False,
    biased: bool = False,
    ffn_norm: str | None = "post_attention_layernorm",
    adds: bool = True,
) -> tuple[Slot, ...]:
    """Norms and projections of llama-like attention; q, k and v multiply the same activations. `ffn_norm` is
    the norm in front of the feed-forward block, None where it shares that of attention. What attention
    gives is not added as it is (`adds`) where a norm or a multiplier stands behind."""
    into = seen(layer, "attn.input", "self_attn.q_proj")
    out = seen(layer, "attn.output", "self_attn.o_proj")
    slots = [
        norm(layer, "attn_norm", "input_layernorm"),
        *linear(layer, "attn_q", Role.ATTN_Q, "self_attn.q_proj", into, biased=biased),
        *linear(layer, "attn_k", Role.ATTN_K, "self_attn.k_proj", into, biased=biased),
        *linear(layer, "attn_v", Role.ATTN_V, "self_attn.v_proj", into, biased=biased),
        *linear(layer, "attn_out", Role.ATTN_OUT, "self_attn.o_proj", out, biased=biased, adds=adds),
    ]
    if ffn_norm is not None:
        slots.append(norm(layer, "ffn_norm", ffn_norm))
    if qk_norm:
        slots += [
            norm(layer, "attn_q_norm", "self_attn.q_norm"),
            norm(layer, "attn_k_norm", "self_attn.k_norm"),
        ]
    return tuple(slots)


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What most families call the three products of a gated block."""


def gated_ffn(
    layer: int,
    module: str = "mlp",
    kind: str = "ffn",
    *,
    names: tuple[str, str, str] = PROJECTIONS,
    biased: bool = False,
    adds: bool = True,
) -> tuple[Slot, ...]:
    """A gated feed-forward block that every token crosses: of a dense layer, or the shared experts."""
    gate, up, down = (f"{module}.{name}" for name in names)
    roles = {
        "ffn": (Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN),
        "shared": (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
    }[kind]
    into = seen(layer, f"{kind}.input", gate)
    inner = seen(layer, f"{kind}.inner", down)
    return (
        *linear(layer, f"{kind}.gate", roles[0], gate, into, biased=biased),
        *linear(layer, f"{kind}.up", roles[1], up, into, biased=biased),
        # Beside routed experts, only those pull the residual's error back: both would do it twice.
        *linear(layer, f"{kind}.down", roles[2], down, inner, biased=biased, adds=adds and kind == "ffn"),
    )


def plain_ffn(layer: int, module: str, kind: str = "ffn") -> tuple[Slot, ...]:
    """The same without a gate."""
    up, down = {
        "ffn": (Role.DENSE_UP, Role.DENSE_DOWN),
        "shared": (Role.SHARED_UP, Role.SHARED_DOWN),
    }[kind]
    into = seen(layer, f"{kind}.input", f"{module}.up_proj")
    inner = seen(layer, f"{kind}.inner", f"{module}.down_proj")
    return (
        *linear(layer, f"{kind}.up", up, f"{module}.up_proj", into),
        *linear(layer, f"{kind}.down", down, f"{module}.down_proj", inner, adds=kind == "ffn"),
    )


def released(slots: tuple[Slot, ...], ours: str, theirs: str) -> tuple[Slot, ...]:
    """The same slots of a module that releases call `theirs` and transformers `ours`: either is read."""
    return tuple(
        replace(
            slot, get=(*(replace(way, name=way.name.replace(ours, theirs)) for way in slot.ways), *slot.ways)
        )
        for slot in slots
    )


def shared_expert(layer: int, module: str = "mlp.shared_expert") -> tuple[Slot, ...]:
    """A shared expert, and the gate [1, h] whose sigmoid scales what it gives."""
    gate = f"model.layers.{layer}.{module}_gate.weight"
    return (
        Slot(f"layers.{layer}.shared.router", Role.SHARED_ROUTER, gate),
        *gated_ffn(layer, module, "shared"),
    )


@dataclass(frozen=True, slots=True)
class Experts:
    """How a family keeps the experts of a layer.

    `width` is f of an expert. `stored` is the module in releases with a tensor an expert ("": they have none
    such), `names` what those call gate, up and down. `module` is where transformers has them, fused:
    gate_up_proj [E, 2f, h], down_proj [E, h, f]; of experts that are not `gated`, up_proj [E, f, h] and
    down_proj. `fused` is what the release calls these two, if otherwise. Where checkpoints may keep fused
    ones transposed, `transposed_for` is h.
    """

    width: int
    stored: str = "mlp.experts"
    names: tuple[str, str, str] = PROJECTIONS
    module: str = "mlp.experts"
    gated: bool = True
    fused: tuple[str, str] | None = None
    transposed_for: int | None = None

    def slots(self, layer: int, adds: bool = True) -> tuple[Slot, ...]:
        """Gate, if there is one, up and down of all experts of a layer."""
        at = f"model.layers.{layer}.{self.module}"
        before = Site(f"layers.{layer}.experts.input", at, "experts")
        inner = Site(f"layers.{layer}.experts.inner", at, "inner")
        if not self.gated:
            return (
                self._slot(layer, 1, Role.UP, "up_proj", (), before),
                self._slot(layer, 2, Role.DOWN, "down_proj", (), inner, adds),
            )
        halves: tuple[tuple[Op, ...], ...] = (Part(0, self.width),), (Part(self.width, 2 * self.width),)
        return (
            self._slot(layer, 0, Role.GATE, "gate_up_proj", halves[0], before),
            self._slot(layer, 1, Role.UP, "gate_up_proj", halves[1], before),
            self._slot(layer, 2, Role.DOWN, "down_proj", (), inner, adds),
        )

    def _slot(
        self, layer: int, which: int, role: Role, param: str, ops: Ops, site: Site, adds: bool = False
    ) -> Slot:
        at, ways = f"model.layers.{layer}", list[Get]()
        fused = f"{at}.{self.module}.{param}"
        if self.stored:  # llm-compressor writes PROJECTIONS, whatever the release says
            names = dict.fromkeys((self.names[which], PROJECTIONS[which]))
            ways += [Get(f"{at}.{self.stored}.{{e}}.{each}.weight") for each in names]
        if self.fused:
            ways.append(Get(f"{at}.{self.fused[which == 2]}", ops))
        name = f"layers.{layer}.experts.{role.value}"
        ways += self._fused(fused, ops)
        if self.stored != self.module:
            ways.append(one_by_one(f"{at}.{self.module}", role))
        return Slot(name, role, fused, tuple(ways), ops, site, Stack.EXPERTS, adds)

    def _fused(self, name: str, ops: Ops) -> tuple[Get, ...]:
        """The ways of a fused stack; square matrices stand as in the model, as transformers takes them."""
        rows, columns = (2 * self.width, self.transposed_for) if ops else (self.transposed_for, self.width)
        if self.transposed_for is None or rows == columns:
            return (Get(name, ops),)
        return (Get(name, ops, rows), Get(name, (Transposed(), *ops), columns))


def one_by_one(module: str, role: Role) -> Get:
    """Experts under transformers' own names, as ModelOpt and llm-compressor store what they quantize, also
    where releases have them in one stack or under other names."""
    which = (Role.GATE, Role.UP, Role.DOWN).index(role)
    return Get(f"{module}.{{e}}.{PROJECTIONS[which]}.weight")


def router(layer: int, stored: str = "mlp.gate", module: str = "mlp.gate") -> Slot:
    """The router's weight; checkpoints may use either name."""
    param, other = (f"model.layers.{layer}.{name}.weight" for name in (module, stored))
    ways = tuple(Get(name) for name in dict.fromkeys((other, param)))
    return Slot(f"layers.{layer}.router", Role.ROUTER, param, ways)


def correction(
    layer: int, name: str = "mlp.gate.e_score_correction_bias", stored: str | None = None, ops: Ops = ()
) -> Slot:
    """What is added to a router's scores for the choice of experts alone: the parameter or buffer `name` of
    the layer, in releases `stored`; `ops` make a vector of either."""
    param, other = (f"model.layers.{layer}.{each}" for each in (name, stored or name))
    ways = tuple(Get(each, ops) for each in dict.fromkeys((other, param)))
    return Slot(f"layers.{layer}.router.correction", Role.CORRECTION, param, ways, ops)


def value(config: Config, name: str, default: Any = None) -> Any:
    """A config's value, or the default where its class has no such key."""
    return getattr(config, name, default)
