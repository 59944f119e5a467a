"""What `compare` found, as tables for a terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moequant.checkpoint.codecs.inputs import AS_THEY_ARE
from moequant.escape import shown, size
from moequant.evaluate import Comparison, Difference, Estimate, Measured, WeightError
from moequant.evaluate.compared import Compared
from moequant.evaluate.divergence import PERCENTILES
from moequant.evaluate.open_source import Source
from moequant.report.compare_running import ran_tables, ran_value, record_table, record_value
from moequant.report.style import line, table

WORST = 8
"""Experts listed as worst; the JSON has all."""

KEPT = str(AS_THEY_ARE)

OUTLIER = 4.0
"""An expert that errs so many times as much as its tensor's middle one is named: damaged, not rounded."""

TELLING = 2.0
"""Standard errors that two candidates must be apart to be called different."""


def verdict(one: Measured) -> str:
    """One sentence: what a candidate lost, and whether an expert was left behind."""
    found = one.comparison
    change = found.perplexity.value / found.base_perplexity.value - 1
    told = f"perplexity {change:+.1%}, {found.same_top:.1%} of top tokens kept"
    moved = [layer.changed for layer in one.routing]
    if moved:
        told += f"; {sum(moved) / len(moved):.1%} of tokens take another set of experts"
    if experts := one.expert_errors:
        hurt = len({(weight.layer, expert) for _, times, weight, expert in experts if times > OUTLIER})
        errs = "expert errs" if hurt < 2 else "experts err"
        told += f"; {hurt or 'no'} {errs} more than {OUTLIER:g} times the median"
    return f"{told}."


def compare_tables(found: Compared) -> RenderableType:
    """Everything a person looks at first, the figures that people quote on top."""
    scored = found.measured[0].comparison.tokens
    rounded = ", inputs of products rounded as their runtime does" if found.rounded else ""
    parts: list[RenderableType] = [
        line(f"{shown(found.base.path)} ({found.base.kind}) is the baseline", style="bold"),
        *(line(f"{one.name}: {verdict(one)}") for one in found.measured),
        *(
            line(f"{source.name}: inputs {told}")
            for source in (found.base, *found.candidates)
            if source.inputs is not None and (told := _activations(found, source)) not in ("exact", KEPT)
        ),
        *(
            line(
                f"{source.name}: keys and values as they are; vLLM keeps them in {source.cache} (its config)"
            )
            for source in (found.base, *found.candidates)
            if source.cache
        ),
        line(
            f"{found.tokens:,} tokens read, {scored:,} scored of: {found.source}; {found.engine}{rounded}\n"
        ),
        _figures(found),
        _tokens(found),
    ]
    if found.differences:
        parts.append(_differences(found.differences))
    if len(found.domains) > 1:
        parts.append(_domains(found))
    if any(one.routing for one in found.measured):
        parts.append(_routing(found.measured))
    for one in found.measured:
        if one.expert_errors:
            parts += [_worst(one), *_outliers(one)]
    parts += [*ran_tables(found.ran), record_table(found.record)]
    parts.append(line(f"{found.cost.seconds:.1f} s, peak memory {size(found.cost.peak_bytes)}"))
    return Group(*parts)


def _figures(found: Compared) -> Table:
    made = table(
        "candidates",
        "",
        "size",
        "of base",
        "perplexity",
        "change",
        "KL mean",
        "median",
        "99 %",
        "99.9 %",
        "max",
    )
    base = found.measured[0].comparison.base_perplexity
    made.add_row(found.base.name, size(found.base.bytes), "", _pm(base, 3), "", "", "", "", "", "")
    for source, one in zip(found.candidates, found.measured, strict=True):
        c = one.comparison
        made.add_row(
            one.name,
            size(source.bytes),
            f"{source.bytes / found.base.bytes:.1%}",
            _pm(c.perplexity, 3),
            f"{c.perplexity.value / c.base_perplexity.value - 1:+.2%}",
            _pm(c.kl_mean, 5),
            f"{c.kl_median:.5f}",
            f"{c.kl_99:.4f}",
            f"{c.kl_999:.4f}",
            f"{c.kl_max:.3f}",
        )
    return made


def _tokens(found: Compared) -> Table:
    made = table(
        "tokens",
        "",
        "same top",
        "top 5",
        "Δp RMS",
        "Δp 1 %",
        "Δp 5 %",
        "Δp median",
        "Δp 95 %",
        "Δp 99 %",
        "rerouted",
    )
    for one in found.measured:
        c = one.comparison
        at = dict(zip(PERCENTILES, c.dp_percentiles, strict=True))
        moved = [layer.changed for layer in one.routing]
        made.add_row(
            one.name,
            f"{c.same_top:.2%} ± {c.same_top_error:.2%}",
            "" if c.top5 is None else f"{c.top5:.2%}",
            f"{c.dp_rms.value:.2%} ± {c.dp_rms.error:.2%}",
            *(f"{at[share]:+.2%}" for share in (1.0, 5.0, 50.0, 95.0, 99.0)),
            f"{sum(moved) / len(moved):.2%}" if moved else "",
        )
    made.caption = (
        "Δp: change of the true token's probability; top 5: shared among the five likeliest; "
        "rerouted: tokens whose set of experts changed, mean of all layers"
    )
    made.caption_justify = "left"
    return made


def _differences(differences: tuple[Difference, ...]) -> Table:
    made = table(
        "candidates against each other, errors paired token by token",
        "",
        "KL mean",
        "log perplexity",
        "better",
    )
    made.columns[3].justify = "left"
    for one in differences:
        better = one.first if one.kl.value > 0 else one.second
        told = f"{better} ({one.sigmas:.1f} standard errors)" if one.sigmas >= TELLING else "not told apart"
        made.add_row(
            f"{one.second} minus {one.first}", _pm(one.kl, 5, "+"), _pm(one.log_perplexity, 5, "+"), told
        )
    return made


def _domains(found: Compared) -> Table:
    made = table("KL divergence by domain", "domain", "tokens", *(one.name for one in found.measured))
    for number, domain in enumerate(found.domains):
        parts = [one.domains[number] for one in found.measured]
        made.add_row(domain, f"{parts[0].tokens:,}", *(_pm(part.kl_mean, 5) for part in parts))
    return made


def _routing(measured: tuple[Measured, ...]) -> Table:
    made = table("tokens whose set of experts changed", "layer", *(one.name for one in measured))
    for layers in zip(*(one.routing for one in measured), strict=True):
        made.add_row(str(layers[0].layer), *(f"{layer.changed:.2%}" for layer in layers))
    return made


def _worst(one: Measured) -> Table:
    made = table(
        f"{one.name}: worst experts",
        "layer.expert",
        "projection",
        "relative error",
        "times the median",
        "tokens",
    )
    for error, times, weight, expert in one.expert_errors[:WORST]:
        seen = "" if weight.tokens is None else f"{int(weight.tokens[expert]):,}"
        made.add_row(f"{weight.layer}.{expert}", str(weight.role), f"{error:.3%}", f"{times:.2f}", seen)
    return made


def _outliers(one: Measured) -> list[Text]:
    named = [
        f"{weight.layer}.{expert} {weight.role} ({times:.0f} x)"
        for _, times, weight, expert in one.expert_errors
        if times > OUTLIER
    ]
    if not named:
        return []
    return [
        line(
            f"{one.name}: {len(named)} experts err more than {OUTLIER:g} x as much as the middle one of "
            f"their tensor, layer.expert: {', '.join(named[:WORST])}{', …' if len(named) > WORST else ''}\n",
            style="bold",
        )
    ]


def _pm(estimate: Estimate, digits: int, sign: str = "") -> str:
    return f"{estimate.value:{sign}.{digits}f} ± {estimate.error:.{digits}f}"


def compare_value(found: Compared) -> dict[str, Any]:
    """All figures for a machine; KL and Δp percentiles are at `percentiles`."""
    return {
        "baseline": _source(found, found.base),
        "engine": found.engine,
        "activations": "; ".join(dict.fromkeys(_activations(found, one) for one in found.candidates)),
        "text": found.source,
        "tokens": found.tokens,
        "domains": list(found.domains),
        "percentiles": list(PERCENTILES),
        "candidates": [
            {**_source(found, source), "name": one.name, **_measured(one, found.domains)}
            for source, one in zip(found.candidates, found.measured, strict=True)
        ],
        "differences": [{**asdict(one), "sigmas": one.sigmas} for one in found.differences],
        "ran": [ran_value(one) for one in found.ran],
        "record": record_value(found.record),
        "seconds": found.cost.seconds,
        "peak_bytes": found.cost.peak_bytes,
    }


def _activations(found: Compared, source: Source) -> str:
    """What is done to the inputs of a version's products: by llama.cpp, by its scheme, or nothing."""
    if found.engine == "llama.cpp" or (found.rounded and source.kind == "GGUF"):
        return "llama.cpp"
    if not found.rounded:
        return "exact"
    told = sorted({str(each) for each in (source.inputs or {}).values()} - {KEPT})
    return "; ".join(told) or KEPT


def _source(found: Compared, source: Source) -> dict[str, Any]:
    return {
        "path": shown(source.path),
        "kind": source.kind,
        "bytes": source.bytes,
        "activations": _activations(found, source),
        "cache_not_computed": source.cache,
        "types": dict(source.types),
    }


def _measured(one: Measured, domains: tuple[str, ...]) -> dict[str, Any]:
    return {
        **_comparison(one.comparison),
        "by_domain": {part.source: _comparison(part) for part in one.domains},
        "rerouted": [
            {
                "layer": layer.layer,
                "changed": layer.changed,
                "by_domain": dict(zip(domains, layer.by_domain, strict=True)),
                "by_expert": list(layer.by_expert),
            }
            for layer in one.routing
        ],
        "weights": [_weight(weight) for weight in one.errors],
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    value = asdict(found)
    del value["source"]
    return value


def _weight(weight: WeightError) -> dict[str, Any]:
    return {
        "weight": weight.weight,
        "role": str(weight.role),
        "layer": weight.layer,
        "relative_error": weight.error.tolist(),
        "tokens": None if weight.tokens is None else weight.tokens.tolist(),
    }
