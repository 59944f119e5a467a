"""A plan for a file: the budget less what is not weights, and which damages decide."""

from __future__ import annotations

from moequant import plan
from moequant.containers.gguf import write as gguf
from moequant.containers.gguf.export import Exported
from moequant.containers.gguf.presets import facts
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec
from moequant.plan import Budget, Damages, data_bytes
from moequant.values import Plan


def overhead(exported: Exported, tokenizer: TokenizerSpec, provenance: dict[str, str]) -> int:
    """Bytes of a GGUF file of this model that are not weights: the same for every plan."""
    weights = exported.weights
    types = {weight.name: "F32" for weight in weights}
    bare = plan.plan_from_types(weights, types)
    return gguf.file_bytes(exported, tokenizer, bare, provenance) - data_bytes(weights, types)


def choose(
    exported: Exported,
    budget: Budget,
    not_weights: int,
    damages: Damages | None = None,
) -> Plan:
    """The best plan whose file, `not_weights` bytes of it fixed, meets the budget.

    Without `damages` the tables of other models decide: enough to know before any work
    whether the budget can be met. PlanError says the smallest possible size when not.
    """
    return plan.make_plan(exported.weights, budget, facts(exported), damages, not_weights)
