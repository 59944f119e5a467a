"""llama.cpp's rules, against the files that llama.cpp made."""

from __future__ import annotations

import json

from gguf import LlamaFileType

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.containers.gguf.presets import (
    BASE_TYPES,
    FILE_TYPES,
    ModelFacts,
    facts,
    llama_cpp_types,
    mostly,
    use_more_bits,
)
from moequant.containers.gguf.sizes import bits_of
from moequant.values import Origin, Place, Role, Stack, Weight
from tests import models


def weight(name: str, role: Role, layer: int | None, n_in: int = 256) -> Weight:
    return Weight(name, role, layer, (64, n_in), Stack.NONE, Origin(()), Place(name), None)


def test_llama_cpp_rules_equal_its_own_files(mix) -> None:
    exported = export(open_checkpoint(mix))
    recorded = json.loads((models.SHARED / "baselines" / "mix.types.json").read_text())
    assert len(recorded) == 22 and recorded.keys() <= BASE_TYPES.keys()
    for preset, expected in recorded.items():
        types = llama_cpp_types(preset, exported.weights, facts(exported))
        found = {exported.names[name]: type_ for name, type_ in types.items()}
        assert {name: found[name] for name in expected} == expected, preset


def test_rules_for_other_models_than_eight_experts() -> None:
    # 16 layers, 64 experts, 8 query heads per key head: read off llama-quant.cpp's branches.
    rows = [weight("output", Role.OUTPUT, None), weight("embd", Role.EMBEDDING, None)]
    roles = (Role.ATTN_V, Role.ATTN_K, Role.ATTN_OUT, Role.GATE, Role.DOWN)
    rows += [weight(f"{layer}.{role}", role, layer) for layer in range(16) for role in roles]
    known = ModelFacts(16, 64, 8, False)
    low = llama_cpp_types("IQ2_S", rows, known)
    assert (low["output"], low["embd"], low["3.attn_v"], low["3.attn_out"]) == (
        "Q5_K",
        "IQ3_S",
        "Q4_K",
        "IQ3_S",
    )
    assert [low[f"{layer}.down"] for layer in range(3)] == ["IQ3_S", "IQ3_S", "IQ2_XS"]
    mixed = llama_cpp_types("IQ3_XS", rows, known)
    assert [mixed[f"{layer}.gate"] for layer in (1, 2, 13, 14)] == ["IQ3_S", "IQ3_XXS", "IQ3_XXS", "IQ3_S"]
    assert (mixed["3.attn_k"], mixed["3.attn_v"]) == ("IQ3_XXS", "Q4_K")
    legacy = llama_cpp_types("Q4_0", rows, known)
    assert [legacy[f"{layer}.down"] for layer in (0, 1, 2)] == ["Q4_1", "Q4_1", "Q4_0"]
    narrow = llama_cpp_types(
        "IQ3_XXS", [weight("w", Role.GATE, 0, 96), weight("o", Role.OUTPUT, None, 96)], known
    )
    assert narrow == {"w": "IQ4_NL", "o": "Q8_0"}


def test_more_bits_at_both_ends_and_every_third_layer() -> None:
    # 32 layers, as in Mixtral-8x7B: the layers llama.cpp gives more bits.
    chosen = [layer for layer in range(32) if use_more_bits(layer, 32)]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_names_are_those_of_gguf() -> None:
    for preset, number in FILE_TYPES.items():
        name = LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        assert name == preset
    assert FILE_TYPES.keys() == BASE_TYPES.keys()
    assert all(bits_of(base) > 1 for base in BASE_TYPES.values())


def test_a_mixed_file_is_named_after_its_largest_part() -> None:
    assert mostly([("F32", 10), ("Q3_K", 900), ("Q6_K", 500)]) == "Q3_K_S"
    assert mostly([("IQ2_S", 5), ("MXFP4", 9)]) == "IQ2_M"
    assert mostly([]) == "F32"
