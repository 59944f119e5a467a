"""The coupled pass: its Grams, its target, and that every weight of every family comes out rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.evaluate import score_row
from moequant.formats import get
from moequant.forward.experts import EXPERTS
from moequant.forward.hidden import OnDisk
from moequant.forward.model import Provider, build_model
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream, Reader
from moequant.rounding.coupled import Coupled, Layer
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.feedback import Options
from moequant.rounding.paired import Grams
from moequant.rounding.recall import Kept
from moequant.rounding.results import decoded, joined
from moequant.rounding.rounder import Rounding
from moequant.rounding.routed import Experts
from moequant.rounding.shrinkage import Mix, Trial
from moequant.rounding.streams import Streams
from moequant.rounding.target import Coupling
from moequant.statistics.calibrate import calibrate
from moequant.statistics.fisher import gather
from moequant.text import bundled
from moequant.text.corpus import Rows
from moequant.values import ExpertLoss, Packed, Role
from tests import models
from tests.statistics.starving import never_chosen

QUICK = Rounding(
    options=Options(effort="fast", rounds=0, threads=1),
    trial=Trial(mixes=(Mix(0.25, 0.5, 0.25), Mix(0.6, 0.2, 0.2)), experts=1, rows=8),
)
"""Coupled rounding with little search in it: where families are compared, that is the same for all."""

BRIEF = Options(effort="fast", rounds=1)
"""Searches of every kind, each a short one."""


def rows(seed: int = 0, count: int = 6) -> Rows:
    ids = torch.randint(5, models.VOCAB, (count, 64), generator=torch.Generator().manual_seed(seed))
    return Rows(ids, ("text",) * count, "random", ids.numel())


def types(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """`name` wherever a weight may be quantized and its blocks fit."""
    return {
        w.name: "F32" if w.role.keeps_precision or len(w.shape) < 2 or w.n_in % get(name).block else name
        for w in checkpoint.weights
    }


def coupled(
    checkpoint: Checkpoint,
    text: Rows,
    formats: dict[str, str],
    rounding: Rounding,
    folder: Path,
    resources: Resources = Resources(threads=1),  # noqa: B008  frozen
) -> dict[str, tuple[Packed, ExpertLoss]]:
    quantizer = Quantizer(calibrate(checkpoint, text, resources))
    folder.mkdir(exist_ok=True)
    with LayerStream(checkpoint, text.ids, resources) as stream:
        run = Coupled(stream, formats, quantizer.pack, rounding).run(Streams.under(folder, stream))
        return {packed.weight.name: (packed, loss) for packed, loss in run}


def kl(checkpoint: Checkpoint, ids: Tensor, *versions: dict[str, tuple[Packed, ExpertLoss]]) -> list[float]:
    """The mean divergence of each version of the model."""

    def logits(provider: Provider) -> Tensor:
        model = build_model(checkpoint, EXPERTS, provider)
        with torch.inference_mode():
            return model(ids).logits

    def divergence(made: dict[str, tuple[Packed, ExpertLoss]]) -> float:
        pairs = zip(base, logits(lambda weight: decoded(made[weight.name][0])), ids, strict=True)
        return float(torch.cat([score_row(*each).kl for each in pairs]).mean())

    base = logits(load)
    return [divergence(made) for made in versions]


def test_grams_are_the_sums_that_the_definition_says(tiny, tmp_path: Path) -> None:
    """Before anything is rounded both streams are the model: Grams against hooks and float64."""
    folder = tiny("qwen3_moe")
    checkpoint, text = open_checkpoint(folder), rows()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    block = model.get_submodule("model.layers.0.mlp")
    seen: dict[str, Tensor] = {}
    block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].flatten(0, 1).double()))
    with torch.inference_mode():
        model(text.ids)
        _, gates, index = block.gate(seen["x"].float())
    with LayerStream(checkpoint, text.ids, Resources(threads=1)) as stream, torch.inference_mode():
        run = Coupled(stream, {}, Quantizer(None).pack, Rounding())
        streams = Streams.under(tmp_path, stream)
        stream.embed(streams.exact)
        stream.embed(streams.rounded)
        assert next(stream.layers()) == 0
        layer = Layer(0, stream.skeleton.layers[0], "", Kept(0))
        weights = tuple(weight for weight in stream.weights(0) if weight.is_expert)
        fed = run.cross(layer, weights, streams)
        routed = Experts(
            run.rounder, stream, layer.part("model.layers.0.mlp.experts"), weights, fed, tmp_path
        )
        one = routed.read(range(8))
        grams = routed.inner_grams(weights[-1], range(8), (one, one))
        assert grams is not None
    experts = block.experts
    for expert in range(8):
        tokens, choice = (index == expert).nonzero(as_tuple=True)
        gate, up = (seen["x"][tokens].float() @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = (F.silu(gate) * up).double()
        expected = ((inner * gates[tokens, choice].double().square()[:, None]).T @ inner).detach()
        for found in (grams.own, grams.cross):  # entries near 0 are sums that cancel: held to the whole
            assert float((found[expert].double() - expected).norm() / expected.norm()) < 1e-5
        assert int(grams.tokens[expert]) == len(tokens)


def test_shared_experts_behind_the_routed_ones_see_their_own_inputs(tiny, tmp_path: Path) -> None:
    """Before anything is rounded, both streams feed a weight the same."""
    checkpoint = open_checkpoint(tiny("solar_open"))
    weight = next(w for w in checkpoint.weights if w.name == "layers.0.shared.down")
    with LayerStream(checkpoint, rows().ids, Resources(threads=1)) as stream:
        run = Coupled(stream, {}, Quantizer(None).pack, Rounding())
        streams = Streams.under(tmp_path, stream)
        stream.embed(streams.exact)
        stream.embed(streams.rounded)
        assert next(stream.layers()) == 0
        layer = Layer(0, stream.skeleton.layers[0], "", Kept(0))
        grams = run.collect(layer, weight, streams)
    assert float((grams.own - grams.cross).norm() / grams.own.norm()) < 1e-5


def test_the_target_is_the_least_squares_answer() -> None:
    """With strength 1 and no ridge, W' x_q is the best prediction of W x_fp + r."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact, residual, weights = random(500, 24), random(500, 10), random(2, 10, 24)
    rounded = exact + 0.3 * random(500, 24)
    own, cross, pull = rounded.T @ rounded, exact.T @ rounded, residual.T @ rounded
    zeros = torch.zeros(2, 24, 24)
    grams = Grams(
        (torch.stack([own, zeros[0]]).float(), zeros),
        torch.stack([cross, zeros[0]]).float(),
        torch.stack([pull, torch.zeros(10, 24)]).float(),
        torch.tensor([500, 0]),
    )
    found = Coupling(strength=1.0, pull=1.0, ridge=0.0, few=0.0).target(weights, grams)
    wanted = torch.linalg.lstsq(rounded, exact @ weights[0].T + residual).solution.T
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-3, atol=1e-3)
    # An expert that no token reached has nothing to be corrected by.
    torch.testing.assert_close(found[1], weights[1].float())


@pytest.mark.parametrize("name", ["F32", "Q8_0"])
def test_next_to_nothing_is_corrected_when_next_to_nothing_is_lost(tiny, tmp_path: Path, name: str) -> None:
    checkpoint, text = open_checkpoint(tiny("mixtral")), rows(count=60)
    made = coupled(checkpoint, text, types(checkpoint, name), Rounding(), tmp_path)
    assert list(made) == [weight.name for weight in checkpoint.weights], "in the order of the file"
    for weight in checkpoint.weights:
        error = (decoded(made[weight.name][0]) - load(weight).float()).norm() / load(weight).float().norm()
        # Measured: 0.027 at most, in attention outputs, whose inputs are small; rounding alone moves 0.005.
        # So at Q8_0 the correction is larger than what it corrects (docs/limits.md).
        assert float(error) <= (0 if name == "F32" else 0.05), weight.name


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_attention_that_was_kept_changes_nothing(tiny, tmp_path: Path, family: str) -> None:
    checkpoint, text = open_checkpoint(tiny(family)), rows(count=24)
    formats, found = types(checkpoint, "Q4_K"), []
    for name, kept_bytes in ("kept", 1 << 30), ("again", 0):
        (tmp_path / name).mkdir()
        rounding = replace(QUICK, kept_bytes=kept_bytes)
        found.append(coupled(checkpoint, text, formats, rounding, tmp_path / name))
    for weight in checkpoint.weights:
        kept, again = (made[weight.name][0].data for made in found)
        assert torch.equal(kept, again), weight.name


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3_moe", {"num_experts": 4}), ("gpt_oss", {"num_hidden_layers": 2}), ("nemotron_h", {})],
)
def test_memory_does_not_change_the_bytes(tiny, tmp_path: Path, family: str, changes: dict) -> None:
    """Experts one by one or all at once, hidden states on disk or not: the same bytes."""
    checkpoint, text = open_checkpoint(tiny(family, **changes)), rows(count=24)
    formats = types(checkpoint, "Q3_K" if family == "qwen3_moe" else "Q4_0")
    if family == "qwen3_moe":
        formats["layers.1.experts.gate"] = "IQ3_XXS"
    rounding = Rounding(options=BRIEF, trial=replace(QUICK.trial, experts=2))
    whole = coupled(checkpoint, text, formats, replace(rounding, gram_bytes=1 << 40), tmp_path / "a")
    spilled = Resources(ram=0, threads=1)
    with LayerStream(checkpoint, text.ids, spilled) as stream:
        assert isinstance(stream.new_hidden(tmp_path), OnDisk)
    parts = coupled(checkpoint, text, formats, replace(rounding, gram_bytes=1), tmp_path / "b", spilled)
    for name, (packed, loss) in whole.items():
        assert torch.equal(packed.data, parts[name][0].data), name
        assert torch.equal(loss.error, parts[name][1].error), name
    left = {path.parent.name for path in tmp_path.glob("b/*/*.f32")}
    assert left == {"exact", "rounded"}, "nothing is left of what was kept within a layer"


def test_every_weight_is_read_once_and_no_layer_as_a_whole(tiny, tmp_path: Path) -> None:
    """Apart from the few experts by which trust in Hessians is chosen."""
    checkpoint, text = open_checkpoint(tiny("qwen3_moe")), rows()
    reader = Reader()
    plain = Quantizer(calibrate(checkpoint, text)).pack
    rounding = replace(QUICK, gram_bytes=1, trial=Trial(experts=0))
    with LayerStream(checkpoint, text.ids, Resources(threads=1), reader) as stream:
        run = Coupled(stream, types(checkpoint, "Q3_K"), plain, rounding)
        list(run.run(Streams.under(tmp_path, stream)))
    for weight in checkpoint.weights:
        if weight.is_expert:
            assert reader.reads[weight.name] == weight.matrices, "one expert at a time, each of them once"


def test_experts_without_tokens_are_rounded_by_what_their_layer_sees(tmp_path: Path) -> None:
    checkpoint, text = open_checkpoint(never_chosen(tmp_path / "model", 3)), rows()
    made = coupled(checkpoint, text, types(checkpoint, "Q4_K"), Rounding(), tmp_path / "work")
    for name in ("layers.0.experts.gate", "layers.1.experts.down"):
        packed, loss = made[name]
        assert loss.tokens is not None and loss.tokens[5:].tolist() == [0, 0, 0]
        exact = load(packed.weight).float()
        lost = (decoded(packed) - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        # Nobody asked for a correction of their weights, so they are the nearest of all.
        assert bool((lost[5:] < 0.15).all()) and bool(lost.isfinite().all())


def trained(model: Path, text: Path | None, count: int) -> tuple[Checkpoint, Rows, Tensor]:
    """A trained model, so many rows of text (None: the bundled), and six others."""
    from moequant.text import corpus
    from moequant.text.rows import token_rows

    checkpoint = open_checkpoint(model)
    rows = token_rows(checkpoint, corpus.read(text, "calibration"), (count + 6) * 512, 0, None)
    ids, domains = rows.ids[:count], rows.domains[:count]
    return checkpoint, replace(rows, ids=ids, domains=domains, tokens=ids.numel()), rows.ids[count:]


def test_hessians_and_coupling_each_lower_the_divergence(tmp_path: Path) -> None:
    """On the demo's model, held-out text: plain search > Hessians > coupled. Measured: 0.67 and 0.80; on a
    larger one with 16 rows 0.75 and 0.83."""
    checkpoint, text, held_out = trained(bundled.path("demo"), None, 12)
    formats = types(checkpoint, "Q2_K")
    quantizer = Quantizer(calibrate(checkpoint, text), "fast")
    plain = {w.name: quantizer.pack(w, formats[w.name]) for w in checkpoint.weights}
    alone, both = (
        coupled(checkpoint, text, formats, Rounding(*rest, options=BRIEF, trial=QUICK.trial), tmp_path / name)
        for name, rest in (("alone", (None,)), ("both", ()))
    )
    found = kl(checkpoint, held_out, plain, alone, both)
    assert found[1] < 0.9 * found[0] and found[2] < 0.95 * found[1], found


def test_fishers_of_few_tokens_lower_the_divergence(mix: Path, tmp_path: Path) -> None:
    """On the layers in the middle of a trained model, held-out text. Measured: 0.84; settings that hardly
    differ gave figures 3 % apart."""
    checkpoint, text, held_out = trained(mix, models.SHARED / "data" / "calib.txt", 12)
    formats = {
        name: type_ if name.startswith(("layers.1.", "layers.2.")) else "F32"
        for name, type_ in types(checkpoint, "Q2_K").items()
    }
    without, felt = (
        coupled(
            checkpoint,
            text,
            formats,
            Rounding(options=BRIEF, trial=QUICK.trial, fisher_tokens=tokens),
            tmp_path / f"{tokens}",
        )
        for tokens in (0, 2048)
    )
    found = kl(checkpoint, held_out, without, felt)
    assert found[1] < 0.95 * found[0], found


def test_fishers_are_gathered_when_asked_for_and_then_used(tiny, tmp_path: Path) -> None:
    checkpoint, text = open_checkpoint(tiny("qwen3_moe", num_experts=4, num_hidden_layers=1)), rows()
    formats = types(checkpoint, "Q3_K")
    brief = replace(BRIEF, two_sided=1)
    rounding = Rounding(options=brief, trial=QUICK.trial, fisher_tokens=128)
    gathered = coupled(checkpoint, text, formats, rounding, tmp_path / "a")
    fishers = gather(checkpoint, text.ids[:2])
    (tmp_path / "b").mkdir()
    with LayerStream(checkpoint, text.ids, Resources(threads=1)) as stream:
        plain = Quantizer(calibrate(checkpoint, text)).pack
        run = Coupled(stream, formats, plain, rounding, fishers).run(Streams.under(tmp_path / "b", stream))
        given = {packed.weight.name: packed for packed, _ in run}
    without = coupled(checkpoint, text, formats, replace(rounding, fisher_tokens=0), tmp_path / "c")
    for weight in checkpoint.weights:
        packed, loss = gathered[weight.name]
        assert torch.equal(packed.data, given[weight.name].data)
        assert not loss.fallbacks
        if formats[weight.name] == "Q3_K" and weight.role is not Role.OUTPUT:
            assert not torch.equal(packed.data, without[weight.name][0].data), weight.name

    embedding = next(weight for weight in checkpoint.weights if weight.role is Role.EMBEDDING)
    exact, felt = load(embedding).double(), fishers.embedding.double()

    def lost(made: Packed) -> float:
        error = decoded(made).double() - exact
        return float(((error @ felt) * error).sum())

    assert lost(gathered[embedding.name][0]) < 0.9 * lost(without[embedding.name][0])


def test_an_embedding_that_is_the_head_as_well_is_searched_plainly(tmp_path: Path) -> None:
    folder = models.build(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    checkpoint, text = open_checkpoint(folder), rows()
    assert checkpoint.tied
    formats = types(checkpoint, "Q4_K")
    embedding = next(weight for weight in checkpoint.weights if weight.role is Role.EMBEDDING)
    plain = Quantizer(calibrate(checkpoint, text)).pack
    fishers = gather(checkpoint, text.ids[:1])
    with LayerStream(checkpoint, text.ids, Resources(threads=1)) as stream:
        run = Coupled(stream, formats, plain, Rounding(), fishers).run(Streams.under(tmp_path, stream))
        first = next(packed for packed, _ in run if packed.weight == embedding)
    assert torch.equal(first.data, plain(embedding, "Q4_K")[0].data)


def test_parts_of_a_weight_are_joined_in_order(tiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    weight = next(w for w in checkpoint.weights if w.role is Role.GATE)
    data = torch.arange(2 * weight.shape[0] * weight.shape[1]).view(weight.shape[0], weight.shape[1], 2)
    loss = ExpertLoss(weight.name, weight.role, 0, "Q4_K", torch.ones(1), torch.ones(1), ("x",))
    parts = [(Packed(weight, "Q4_K", part), loss) for part in data.split(3)]
    packed, total = joined(weight, parts)
    assert torch.equal(packed.data, data) and total.fallbacks == ("x",) * len(parts)
