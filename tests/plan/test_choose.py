"""Plans: never above the budget, the budget spent, gate and up alike, and a reason in every row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.containers.gguf.presets import (
    BASE_TYPES,
    LEGACY,
    UNQUANTIZED,
    ModelFacts,
    facts,
    llama_cpp_types,
)
from moequant.containers.gguf.sizes import bits_of, data_bytes, packed_bytes
from moequant.errors import PlanError
from moequant.plan import Budget, aligned, make_plan, preset_plan, prior_sensitivities
from moequant.plan.sensitivity import RELATIVE_ERROR, candidates
from moequant.values import Origin, Place, Plan, Role, Stack, Weight
from moequant.values.ops import Interleaved, Part, Transposed
from tests import models

FACTS = ModelFacts(2, 4, 1, False)


def weight(name: str, role: Role, *shape: int, layer: int | None = 0) -> Weight:
    stack = Stack.EXPERTS if len(shape) == 3 else Stack.NONE
    return Weight(name, role, layer, shape, stack, Origin(()), Place(name), None)


def layers(count: int = 2) -> tuple[Weight, ...]:
    made = [weight("embedding", Role.EMBEDDING, 512, 256, layer=None)]
    for at in range(count):
        made += [
            weight(f"layers.{at}.attn_v", Role.ATTN_V, 128, 256, layer=at),
            weight(f"layers.{at}.ffn_norm", Role.NORM, 256, layer=at),
            weight(f"layers.{at}.router", Role.ROUTER, 4, 256, layer=at),
            weight(f"layers.{at}.experts.gate", Role.GATE, 4, 256, 256, layer=at),
            weight(f"layers.{at}.experts.up", Role.UP, 4, 256, 256, layer=at),
            weight(f"layers.{at}.experts.down", Role.DOWN, 4, 256, 256, layer=at),
        ]
    return tuple(made)


def types(plan: Plan) -> dict[str, str]:
    return {choice.weight: choice.format for choice in plan.choices}


@pytest.mark.parametrize("family", models.CONFIGS)
def test_presets_are_no_larger_than_llama_cpp(tiny, family: str) -> None:
    exported = export(open_checkpoint(tiny(family)))
    checkpoint, known = exported.checkpoint, facts(exported)
    for preset in BASE_TYPES:
        plan = preset_plan(checkpoint.weights, preset, known)
        theirs = llama_cpp_types(preset, checkpoint.weights, known)
        chosen, limit = types(plan), data_bytes(checkpoint.weights, theirs)
        assert 0.97 * limit < data_bytes(checkpoint.weights, chosen) <= limit, preset
        if preset in LEGACY | UNQUANTIZED:
            assert chosen == theirs, preset
        else:
            assert min(map(bits_of, chosen.values())) >= min(map(bits_of, theirs.values())), preset
        pairs = {name: name.removesuffix("gate") + "up" for name in chosen if name.endswith(".gate")}
        pairs = {gate: up for gate, up in pairs.items() if up in chosen}
        assert pairs or family.startswith("nemotron_h"), "only its experts have no gate"
        assert all(chosen[gate] == chosen[up] for gate, up in pairs.items()), preset
        kept = {w.role is Role.TABLE: chosen[w.name] for w in checkpoint.weights if w.role.keeps_precision}
        assert kept.items() <= {False: "F32", True: "I32"}.items(), preset


@pytest.mark.parametrize("spare", [0.0, 0.1, 0.7, 0.999])
def test_a_size_is_never_exceeded_and_mostly_used(spare: float) -> None:
    weights, sensitivities = layers(), prior_sensitivities(layers(), 2)
    smallest = sum(min(aligned(packed_bytes(name, w)) for name in candidates(w)) for w in weights)
    largest = sum(max(aligned(packed_bytes(name, w)) for name in candidates(w)) for w in weights)
    overhead = 12_345
    size = overhead + round(smallest + spare * (largest - smallest))
    plan = make_plan(weights, Budget.of_size(str(size)), FACTS, sensitivities, overhead)
    taken = overhead + data_bytes(weights, types(plan))
    assert taken <= size
    # A step of the smallest weight between neighbouring types is what may stay unused.
    assert size - taken < 128 * 256 * 2
    assert plan.budget == size - overhead


def test_bits_per_weight_count_every_weight() -> None:
    weights = layers()
    plan = make_plan(weights, Budget.of_bpw(4.0), FACTS)
    bits = 8 * plan.bytes / sum(w.numel for w in weights)
    assert 3.9 < bits <= 4.0


def test_a_budget_below_the_smallest_file_says_how_small_it_can_be() -> None:
    weights = layers()
    with pytest.raises(
        PlanError, match=r"at most 1000 bytes: the smallest possible file has ([\d,]+) bytes"
    ) as found:
        make_plan(weights, Budget.of_size("1000"), FACTS, overhead=500)
    smallest = str(found.value).split(" has ")[1].split(" bytes")[0].replace(",", "")
    assert make_plan(weights, Budget.of_size(smallest), FACTS, overhead=500).bytes <= int(smallest) - 500
    with pytest.raises(PlanError, match="smallest possible file"):
        make_plan(weights, Budget.of_size(str(int(smallest) - 1)), FACTS, overhead=500)
    with pytest.raises(PlanError, match=r"smallest possible plan has 1\.\d+ bits per weight"):
        make_plan(weights, Budget.of_bpw(1.0), FACTS)


def test_bytes_go_where_they_save_most() -> None:
    weights = layers()
    prior = prior_sensitivities(weights, 2)
    table = {
        name: {fmt: cost * (1000 if name == "layers.1.experts.down" else 1) for fmt, cost in row.items()}
        for name, row in prior.table.items()
    }
    plan = make_plan(weights, Budget.of_bpw(3.8), FACTS, replace(prior, table=table, measured=True))
    chosen = types(plan)
    assert chosen["layers.1.experts.down"] == "Q8_0"
    assert bits_of(chosen["layers.0.attn_v"]) < bits_of(chosen["layers.1.experts.down"])
    reasons = {choice.weight: choice.reason for choice in plan.choices}
    assert reasons["layers.1.experts.down"] == "measured: more bits pay"
    assert reasons["layers.0.experts.gate"] == "measured: fewer bits pay"


def test_sensitivities_of_a_plan_add_up_to_its_prediction() -> None:
    weights = layers()
    prior = prior_sensitivities(weights, 2)
    bent = replace(prior, linear=0.7, root=0.03)
    plan, raw = (make_plan(weights, Budget.of_bpw(3.5), FACTS, known) for known in (bent, prior))
    assert types(plan) == types(raw), "how sensitivities add up does not change what is best"
    assert plan.kl == pytest.approx(0.7 * raw.kl + 0.03 * raw.kl**0.5)


def test_rows_that_256_does_not_divide_fall_back_and_say_so() -> None:
    rows = (
        weight("layers.0.experts.down", Role.DOWN, 4, 256, 1408),
        weight("layers.0.odd", Role.ATTN_OUT, 256, 1000),
        weight("layers.0.norm", Role.NORM, 256),
    )
    down, odd, norm = preset_plan(rows, "Q4_K_S", ModelFacts(1, 4, 1, False)).choices
    assert down.format == "Q5_0" and "256 does not divide rows of 1408" in down.reason
    assert odd.format == "F16" and "32 does not divide rows of 1000" in odd.reason
    assert norm.format == "F32" and "stays F32" in norm.reason


def test_unknown_presets_are_listed() -> None:
    with pytest.raises(PlanError, match=r"Q9_Z.*Q4_K_M"):
        preset_plan((), "Q9_Z", ModelFacts(1, 0, 1, False))


def test_mxfp4_is_for_weights_that_are_stored_so() -> None:
    plain = weight("w", Role.DOWN, 4, 32, 96)
    packed = replace(plain, origin=Origin((), holds="MXFP4"))
    assert "MXFP4" not in candidates(plain) and candidates(packed)[0] == "MXFP4"
    (choice,) = make_plan((packed,), Budget.of_bpw(9.0), FACTS).choices
    assert choice.format == "MXFP4" and choice.kl == 0.0, "nothing is lost, so nothing larger is bought"


def test_blocks_that_a_container_cuts_across_are_not_kept_as_they_are_stored() -> None:
    """Rows that are moved take their blocks along; a transposed matrix does not."""
    packed = replace(weight("w", Role.DOWN, 4, 32, 96), origin=Origin((), holds="MXFP4"))
    assert candidates(packed.refined((Part(0, 32, 2), Interleaved(2))))[0] == "MXFP4"
    assert "MXFP4" not in candidates(packed.refined((Transposed(),)))


def test_tables_have_every_candidate() -> None:
    for n_in in (256, 96):
        assert set(candidates(weight("w", Role.DOWN, 4, 32, n_in))) <= RELATIVE_ERROR.keys()
