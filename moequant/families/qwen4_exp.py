"""Qwen3.8-Flash-Next: Qwen3.5's delta nets and gated attention, which an indexer shows blocks of tokens,
between several streams; a layer looks the last tokens up in a table that is larger than all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    linear,
    moe_shape,
    norm,
    router,
    seen,
    shared_expert,
)
from moequant.families.blocks import ends as plain_ends
from moequant.families.delta_net import DELTA_KEYS, LINEAR, MTP, delta_net
from moequant.families.predictions import like, parts
from moequant.families.qwen3_5_moe import PROJECTIONS
from moequant.families.qwen3_vl_moe import VISION
from moequant.values import ModelShape, Role
from moequant.values.ops import Joined, Squeezed, Stacked, Transposed

MIXER = "model.hyper_connection_mixer"
"""What makes one hidden state of the streams, behind the last layer."""

MIXING = {
    "norm": ("hc_norm", Role.NORM),
    "down": ("input_mix_weight_down", Role.STREAMS),
    "up": ("input_mix_weight_up", Role.STREAMS),
}
"""Its parts, by our names."""

TABLE = "ngrams"
"""Our name of the table, within its layer."""

MOST_PARTS = 1 << 16
"""A table is stored in fewer parts: more are a slip of the config, and would be listed."""


def shape(config: Config) -> ModelShape:
    """The shape of the model."""
    return replace(moe_shape(config), streams=int(config.hc_count), in_a_row=True)


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. Nothing is added to a stream as it is, and only streams are normalised in front."""
    slots = (
        *(_ngrams(config, number) if number + 1 in config.ple_layer_ids else ()),
        *_connection(number, "attn"),
        *_mixer(config, number),
        *_connection(number, "mlp", "ffn"),
        router(number),
        *Experts(config.moe_intermediate_size).slots(number),
        *shared_expert(number),
    )
    return tuple(replace(slot, adds=False) for slot in slots)


def _mixer(config: Config, number: int) -> tuple[Slot, ...]:
    """A delta net, or attention to what an indexer chooses, without norms in front."""
    if config.layer_types[number] == LINEAR:
        slots = delta_net(number, PROJECTIONS)
    else:
        slots = (*_indexer(number), *attention(number, qk_norm=True, biased=True))
    own = f"layers.{number}."
    return tuple(slot for slot in slots if slot.name not in (f"{own}attn_norm", f"{own}ffn_norm"))


def _indexer(number: int) -> tuple[Slot, ...]:
    """Queries and one head of keys of the indexer, in one matrix: it is fed what attention is fed."""
    into, at = seen(number, "attn.input", "self_attn.q_proj"), "self_attn.indexer"
    return (
        *linear(number, "indexer.qk", Role.INDEXER, f"{at}.index_qk_proj", into),
        norm(number, "indexer.q_norm", f"{at}.q_layernorm"),
        norm(number, "indexer.k_norm", f"{at}.k_layernorm"),
    )


def _connection(number: int, module: str, kind: str | None = None) -> tuple[Slot, ...]:
    """What reads a hidden state out of the streams, through a narrow product, and weighs what is added."""
    own, at = f"hc_{kind or module}", f"{module}_hyper_connection"
    into = seen(number, f"{own}.input", f"{at}.input_mix_weight_down")
    narrow = seen(number, f"{own}.narrow", f"{at}.input_mix_weight_up")
    inject = f"model.layers.{number}.{at}.block_inject_weight.weight"
    return (
        norm(number, f"{own}_norm", f"{at}.hc_norm"),
        *linear(number, f"{own}_down", Role.STREAMS_IN, f"{at}.input_mix_weight_down", into),
        *linear(number, f"{own}_up", Role.STREAMS_OUT, f"{at}.input_mix_weight_up", narrow),
        Slot(f"layers.{number}.{own}_inject", Role.STREAMS, inject),
    )


def _ngrams(config: Config, number: int) -> tuple[Slot, ...]:
    """A table of rows for the last tokens, stored in parts; keys and values of what is looked up, a norm of
    each side of their gate, and a convolution over what passes it."""
    at = f"model.layers.{number}.ple"
    into = seen(number, "ple.input", "ple.key_proj")
    rows, count = f"{at}.ple_embedding.ngram_embedding", int(config.split_ngram_parts)
    if not 0 < count <= MOST_PARTS:
        raise FamilyError(
            f"qwen4_exp: config key split_ngram_parts = {count}: 1 to {MOST_PARTS:,} were expected"
        )
    first, *below = (f"{rows}.shard_{part}.weight" for part in range(count))
    conv = f"{at}.conv1d.weight"
    return (
        Slot(
            f"layers.{number}.{TABLE}",
            Role.LOOKUP,
            f"{rows}.weight",
            (Get(first, below=tuple(below)), Get(f"{rows}.weight")),
        ),
        *linear(number, "ple.key", Role.LOOKUP_IN, "ple.key_proj", into),
        *linear(number, "ple.value", Role.LOOKUP_IN, "ple.value_proj", into),
        norm(number, "ple.key_norm", "ple.norm_key"),
        norm(number, "ple.query_norm", "ple.norm_query"),
        norm(number, "ple.conv_norm", "ple.norm_conv"),
        Slot(f"layers.{number}.ple.conv", Role.CONV, conv, (Get(conv, (Squeezed(-2),)),), (Squeezed(-2),)),
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """The streams become one behind the last layer: its norm is the final one."""
    embedding, _, head = plain_ends(config, MIXER)
    mixing = (Slot(f"hc_{own}", role, f"{MIXER}.{module}.weight") for own, (module, role) in MIXING.items())
    return (embedding, *mixing, head)


@dataclass(frozen=True, slots=True)
class Hash:
    """How the numbers of the last tokens choose rows: for every n up to the longest, the tokens times
    `multipliers`, joined by exclusive or, modulo the size of each head's part of the table."""

    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first row of each head's part."""
        return tuple(sum(self.sizes[:head]) for head in range(len(self.sizes)))

    @classmethod
    def of(cls, config: Config, number: int) -> Hash:
        """That of a layer which looks tokens up."""
        which, longest = list(config.ple_layer_ids).index(number + 1), int(config.ngram_size)
        heads = (longest - 1) * int(config.heads_per_ngram)
        primes = _primes(int(config.ngram_vocab_size_base), (which + 1) * heads)[which * heads :]
        seed = int(config.seed) + 10007 * which
        half = max(1, ((1 << 63) - 1) // max(1, int(config.vocab_size)) // 2)
        return cls(tuple(2 * (_mixed(seed, at) % half) + 1 for at in range(1, longest + 1)), primes)


_WORD = (1 << 64) - 1


def _mixed(seed: int, step: int) -> int:
    """The word that SplitMix64 (Steele et al. 2014) gives in a step; the model starts one step later."""
    z = (seed + 0x9E3779B97F4A7C15 * (step + 1)) & _WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ z >> shift) * factor) & _WORD
    return z ^ z >> 31


@cache
def _primes(first: int, count: int) -> tuple[int, ...]:
    """So many primes from `first` on."""
    found: list[int] = []
    candidate = max(2, first)
    while len(found) < count:
        if all(candidate % divisor for divisor in range(2, isqrt(candidate) + 1)):
            found.append(candidate)
        candidate += 1
    return tuple(found)


def constants(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Whole numbers that checkpoints hold, and the class makes of its config as well."""
    return dict(_constants(config))


def _constants(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    for one in config.ple_layer_ids:
        found, at = Hash.of(config, one - 1), f"model.layers.{one - 1}.ple.ple_embedding"
        yield f"{at}.layer_multipliers", found.multipliers
        yield f"{at}.ngram_heads_vocab_sizes", found.sizes
        yield f"{at}.ngram_heads_offsets", found.offsets


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """One layer under `mtp.`, like those with an indexer, whose streams are joined and mixed by its own."""
    indexed = [number for number, kind in enumerate(config.layer_types) if kind != LINEAR]
    if not indexed or int(getattr(config, "mtp_num_hidden_layers", None) or 1) != 1:
        return ()
    number, twin = int(config.num_hidden_layers), indexed[-1]
    own, mixer = f"layers.{number}.nextn", "mtp.hyper_connection_mixer"
    # Stored as one matrix for each input: here they stand side by side.
    beside = (Stacked(2), Transposed(), Joined(), Transposed())
    join = Get("mtp.fc_embedding.weight", beside, below=("mtp.fc_hidden.weight",))
    norms = {"embedding_norm": "mtp.pre_fc_norm_embedding", "hidden_norm": "mtp.pre_fc_norm_hidden"}
    return (
        (
            *like(layer(config, twin), twin, number, "mtp.layers.0."),
            Slot(f"{own}.join", Role.NEXTN, "", (join,)),
            *parts(number, norms),
            *(
                Slot(f"{own}.hc_{name}", role, "", (Get(f"{mixer}.{module}.weight"),))
                for name, (module, role) in MIXING.items()
            ),
        ),
    )


def skipped(config: Config) -> Mapping[str, str]:
    """What is left out."""
    return {**MTP, **VISION}


QWEN4_EXP = Family(
    name="qwen4_exp",
    classes=("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"),
    model_type="qwen4_exp_text",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | DELTA_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "output_gate_type",
        "hc_count",
        "hc_lowrank",
        "indexer_n_heads",
        "indexer_kv_heads",
        "indexer_head_dim",
        "indexer_budget",
        "indexer_compress_ratio",
        "ple_layer_ids",
        "ple_embed_dim",
        "ple_conv_kernel_size",
        "ngram_size",
        "heads_per_ngram",
        "ngram_vocab_size_base",
        "make_ngram_vocab_size_divisible_by",
        "seed",
        "split_ngram_parts",
        "image_token_id",
        "mtp",  # of the layer that predicts, whose tensors say the same
        "ple_embedding_dtype",  # as the tensors say themselves
        "number_of_conv_states",  # of a cache that nothing here has
    },
    says={
        "attn_output_gate": (True,),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
        "use_sliding_window": (False,),
    },
    skipped=skipped,
    predictions=predictions,
    constants=constants,
    renamed=(("model.language_model.", "model."), ("model.mtp.", "mtp.")),
    hoisted=(("", "image_token_id"),),
)
