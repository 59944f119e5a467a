"""From weights, sensitivities and a budget to a plan with a reason in every row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moequant.containers.gguf.presets import LEGACY, UNQUANTIZED, ModelFacts, llama_cpp_types, mostly
from moequant.containers.gguf.sizes import (
    Budget,
    aligned,
    bits_of,
    check_preset,
    checksum_bytes,
    data_bytes,
    packed_bytes,
)
from moequant.errors import PlanError
from moequant.plan.allocate import Option, Unit, allocate
from moequant.plan.pins import REASON
from moequant.plan.sensitivity import Sensitivities, as_stored, candidates, prior_sensitivities
from moequant.values import Choice, Plan, Weight

NO_PINS: Mapping[str, str] = {}

_ENDS = {"nextn.embedding": "embedding", "nextn.head": "embedding", "attn_qkv": "attn_q"}
"""What layers that predict have in the place of the model's own: no head comes before them in a file."""

NEAR = 0.5
"""Bits per weight around the file's own that a reason calls average."""


def preset_plan(
    weights: tuple[Weight, ...], preset: str, facts: ModelFacts, sensitivities: Sensitivities | None = None
) -> Plan:
    """A plan no larger than llama.cpp's file of that name. PlanError for an unknown preset."""
    return make_plan(weights, Budget.of_preset(preset), facts, sensitivities)


def make_plan(
    weights: tuple[Weight, ...],
    budget: Budget,
    facts: ModelFacts,
    sensitivities: Sensitivities | None = None,
    overhead: int = 0,
    pins: Mapping[str, str] = NO_PINS,
) -> Plan:
    """The plan of least KL divergence within the budget; `overhead` bytes are header and tokenizer.

    Weights in `pins` have the types that it says, and the others share the rest of the budget. Without
    measured sensitivities the tables of other models decide, and then no weight goes below what
    llama.cpp's preset would give its lowest, where pins leave so much. PlanError says the smallest
    possible size when the budget is below it.
    """
    sensitivities = sensitivities or prior_sensitivities(weights, facts.layers)
    if budget.preset is not None:
        check_preset(budget.preset)
        if budget.preset in LEGACY | UNQUANTIZED:
            return _as_llama_cpp(weights, budget.preset, facts, sensitivities, pins)
    followed = [(one, twin) for one, twin in twins(weights) if one.name not in pins]
    floor = _floor_bits(weights, budget, facts, sensitivities)
    units = make_units(weights, sensitivities, floor, pins)
    limit = budget.weight_bytes(weights, facts, overhead)
    if (pins or followed) and _smallest(units) > limit:
        if pins:
            _check_pins(weights, pins, budget, limit)
        units = _with_room(weights, sensitivities, floor, pins, limit)
    smallest = _smallest(units)
    if budget.preset is not None:  # the whole file is no larger than llama.cpp's, where anything can give way
        limit = max(limit - checksum_bytes(weights), min(smallest, limit))
    if smallest > limit:
        raise PlanError(_too_small(weights, budget, smallest, overhead) + (f" ({REASON})" if pins else ""))
    chosen = allocate(units, limit)
    types = {
        weight.name: option.format
        for unit, option in zip(units, chosen, strict=True)
        for weight in unit.weights
    }
    types |= {one.name: safer(types[twin.name], one) for one, twin in followed}
    reasons = _reasons(weights, types, sensitivities) | dict.fromkeys(pins, REASON)
    preset = budget.preset or mostly((types[weight.name], weight.numel) for weight in weights)
    return _plan(weights, types, reasons, sensitivities, Plan(preset, (), limit, budget.text))


def make_units(
    weights: tuple[Weight, ...],
    sensitivities: Sensitivities,
    floor_bits: float = 0.0,
    pins: Mapping[str, str] = NO_PINS,
) -> list[Unit]:
    """Groups of weights that share a format, each with its formats of at least `floor_bits` per weight.

    A weight in `pins` is a group of its own with one format. Weights that follow another one (`twins`) are in
    no group, but their bytes are counted with the one that they follow.
    """
    after: dict[str, list[Weight]] = {}
    for follower, twin in twins(weights):
        if follower.name not in pins:
            after.setdefault(twin.name, []).append(follower)
    following = {one.name for each in after.values() for one in each}
    free = groups(tuple(w for w in weights if w.name not in pins and w.name not in following))
    alone = [weight for weight in weights if weight.name in pins]

    def behind(group: Iterable[Weight]) -> list[Weight]:
        return [follower for weight in group for follower in after.get(weight.name, ())]

    return [
        *(Unit(group, _options(group, sensitivities, floor_bits, behind(group))) for group in free),
        *(Unit((w,), (_pinned(w, pins[w.name], sensitivities, behind((w,))),)) for w in alone),
    ]


def _pinned(weight: Weight, name: str, sensitivities: Sensitivities, followers: Iterable[Weight]) -> Option:
    """The one format of a pinned weight. With no other option its cost decides nothing: 0 if unmeasured."""
    size = _bytes(name, (weight,), followers)
    return Option(name, size, _kl(sensitivities, weight, name) or 0.0)


def _bytes(name: str, group: Iterable[Weight], followers: Iterable[Weight]) -> int:
    """What a group takes in a format, with what follows it."""
    own = sum(aligned(packed_bytes(name, weight)) for weight in group)
    return own + sum(aligned(packed_bytes(safer(name, one), one)) for one in followers)


def _smallest(units: Iterable[Unit]) -> int:
    """Bytes of the smallest formats."""
    return sum(min(option.bytes for option in unit.options) for unit in units)


def _check_pins(weights: tuple[Weight, ...], pins: Mapping[str, str], budget: Budget, limit: int) -> None:
    """PlanError when the pinned weights alone are too large."""
    alone = [weight for weight in weights if weight.name in pins]
    taken = data_bytes(alone, dict(pins))
    if taken > limit:
        raise PlanError(
            f"{budget.text}: the weights {REASON} take {taken:,} bytes alone, {max(limit, 0):,} are left for "
            "all; pin fewer weights, smaller types, or ask for more"
        )


def twins(weights: Iterable[Weight]) -> list[tuple[Weight, Weight]]:
    """Weights of layers that predict the token after the next, each with the last one of the model that is
    of its kind: the text says nothing of what their rounding costs."""
    last: dict[str, Weight] = {}
    found = []
    for weight in weights:
        own = weight.name.removeprefix(f"layers.{weight.layer}.")
        if weight.runs:
            last[own] = weight
        elif (twin := last.get(_ENDS.get(own, own))) and len(weight.shape) > 1 and weight.n_in == twin.n_in:
            found.append((weight, twin))
    return found


def safer(name: str, weight: Weight) -> str:
    """The next larger of the formats that a weight may have."""
    names = [each for each in candidates(weight) if bits_of(each) > bits_of(name)]
    return names[0] if names else candidates(weight)[-1]


def groups(weights: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
    """Weights in order; gate and up of the same block (experts, shared or dense) together."""
    groups: dict[object, list[Weight]] = {}
    for weight in weights:
        kind = str(weight.role)
        block = kind.removesuffix("gate") if kind.endswith("gate") else kind.removesuffix("up")
        groups.setdefault((weight.layer, block) if block != kind else weight.name, []).append(weight)
    return [tuple(group) for group in groups.values()]


def _options(
    group: tuple[Weight, ...],
    sensitivities: Sensitivities,
    floor_bits: float,
    followers: Iterable[Weight] = (),
) -> tuple[Option, ...]:
    """The formats that every weight of a group may have, with what they and their followers cost together.

    One that holds the checkpoint's own numbers loses nothing, however few its bits are.
    """
    names = [
        name
        for name in candidates(group[0])
        if all(name in sensitivities.table[weight.name] for weight in group)
    ]
    exact = as_stored(group[0])
    if not group[0].runs:
        names = names[-1:]
    allowed = [name for name in names if bits_of(name) >= floor_bits or name == exact] or names[-1:]
    return tuple(
        Option(
            name,
            _bytes(name, group, followers),
            sum(sensitivities.table[weight.name][name] for weight in group),
        )
        for name in allowed
    )


def _with_room(
    weights: tuple[Weight, ...],
    sensitivities: Sensitivities,
    floor_bits: float,
    pins: Mapping[str, str],
    limit: int,
) -> list[Unit]:
    """Units under the highest floor below `floor_bits` that leaves room for pins and for drafts, which are
    larger than llama.cpp's; without a floor where none does."""
    known = {bits_of(name) for weight in weights for name in candidates(weight)}
    for lower in (*sorted((bits for bits in known if bits < floor_bits), reverse=True), 0.0):
        units = make_units(weights, sensitivities, lower, pins)
        if _smallest(units) <= limit:
            break
    return units


def _floor_bits(
    weights: tuple[Weight, ...], budget: Budget, facts: ModelFacts, sensitivities: Sensitivities
) -> float:
    """Fewest bits that a weight may get: tables of other models are not trusted below llama.cpp's own."""
    if sensitivities.measured or budget.preset is None:
        return 0.0
    return min(bits_of(name) for name in llama_cpp_types(budget.preset, weights, facts).values())


def _too_small(weights: tuple[Weight, ...], budget: Budget, smallest: int, overhead: int) -> str:
    if budget.bpw is not None:
        least = 8 * smallest / sum(weight.numel for weight in weights)
        return f"{budget.text}: the smallest possible plan has {least:.3f} bits per weight; ask for more"
    return (
        f"{budget.text}: the smallest possible file has {smallest + overhead:,} bytes "
        f"({overhead:,} of them header and tokenizer); ask for more"
    )


def _as_llama_cpp(
    weights: tuple[Weight, ...],
    preset: str,
    facts: ModelFacts,
    sensitivities: Sensitivities,
    pins: Mapping[str, str],
) -> Plan:
    """llama.cpp's own types, but for pins: for presets that are asked for because of their kernels, or not
    quantized. Nothing gives way to a pin there."""
    types = {**llama_cpp_types(preset, weights, facts), **pins}
    reasons = {
        weight.name: _fixed(weight) or ("llama.cpp's rule" if preset in LEGACY else "not quantized")
        for weight in weights
    } | dict.fromkeys(pins, REASON)
    limit = data_bytes(weights, types)
    return _plan(weights, types, reasons, sensitivities, Plan(preset, (), limit, preset))


def _plan(
    weights: tuple[Weight, ...],
    types: Mapping[str, str],
    reasons: Mapping[str, str],
    sensitivities: Sensitivities,
    frame: Plan,
) -> Plan:
    """`frame` with its choices: the sum of their costs is the prediction for the whole."""
    raw = {weight.name: _kl(sensitivities, weight, types[weight.name]) for weight in weights}
    known = [value for value in raw.values() if value is not None]
    total = sum(known)
    share = sensitivities.predict(total) / total if total else 1.0
    choices = tuple(
        Choice(
            weight.name,
            types[weight.name],
            packed_bytes(types[weight.name], weight),
            reasons[weight.name],
            None if (value := raw[weight.name]) is None else value * share,
        )
        for weight in weights
    )
    return Plan(frame.preset, choices, frame.budget, frame.target)


def _kl(sensitivities: Sensitivities, weight: Weight, name: str) -> float | None:
    return 0.0 if name in UNQUANTIZED else sensitivities.table[weight.name].get(name)


def _reasons(
    weights: Iterable[Weight], types: Mapping[str, str], sensitivities: Sensitivities
) -> dict[str, str]:
    """Why each weight has its type: what forced it, or how its bits lie to the file's."""
    weights = tuple(weights)
    numel = sum(weight.numel for weight in weights)
    mean = sum(bits_of(types[weight.name]) * weight.numel for weight in weights) / max(1, numel)
    source = "measured" if sensitivities.measured else "tables"
    reasons = {}
    for weight in weights:
        bits = bits_of(types[weight.name])
        words = "more bits" if bits > mean + NEAR else "fewer bits" if bits < mean - NEAR else "average bits"
        kept = "the very numbers of the checkpoint" if types[weight.name] == as_stored(weight) else None
        reasons[weight.name] = kept or _fixed(weight) or f"{source}: {words} pay"
    return reasons


def _fixed(weight: Weight) -> str | None:
    """Why a weight has little or no choice of formats; None when it has all."""
    if weight.fixed_type is not None:
        return f"{weight.role} stays {weight.fixed_type}"
    if not weight.runs:
        return "drafts: a step safer than the layer it is like"
    if weight.n_in % 32:
        return f"fallback: 32 does not divide rows of {weight.n_in}"
    if weight.n_in % 256:
        return f"fallback: 256 does not divide rows of {weight.n_in}"
    return None
