"""Releases of other tools: their inputs are rounded as their configs say, held against float64 by hand."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moequant.checkpoint import load, open_checkpoint
from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.codecs.inputs import Inputs, inputs_of
from moequant.commands.compare import CompareSettings, run
from moequant.errors import VerifyError
from moequant.evaluate.activations import Rounded, rounding
from moequant.evaluate.open_source import open_source
from moequant.evaluate.side_by_side import Version, compare
from moequant.report.compare import compare_tables, compare_value
from tests.evaluate import released
from tests.evaluate.released import E2M1, number, release
from tests.forward.test_stream import SMALL, rows

Round = Callable[[str, Tensor], Tensor]
"""The inputs f64 [n, k] of a module as its release wants them."""

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """f64: the nearest of the numbers and their negatives, of two the one with the even code."""
    size, order = values.abs().clamp_max(numbers[-1]), torch.searchsorted(numbers, values.abs().contiguous())
    above = order.clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.where(up, high, low) * values.sign()


def by_group(group: int, power: bool = False) -> Round:
    """e4m3 under a scale of each `group` channels of a token that just reaches the largest."""

    def made(module: str, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for at in range(0, x.shape[1], group):
            part = x[:, at : at + group]
            scale = part.abs().amax(1, keepdim=True) / 448
            scale = 2.0 ** torch.ceil(torch.log2(scale)) if power else scale
            out[:, at : at + group] = nearest(part / scale, E4M3) * scale
        return out

    return made


def fixed(module: str, x: Tensor) -> Tensor:
    """e4m3 under the stored scale."""
    scale = torch.tensor(largest(module)).double()
    return nearest(x / scale, E4M3) * scale


def fp4(module: str, x: Tensor) -> Tensor:
    """e2m1 under an e4m3 scale of 16 channels, and the stored one of all."""
    two = torch.tensor(largest(module) / 6).double()
    groups = x.unflatten(1, (-1, 16))
    scale = nearest(groups.abs().amax(-1, keepdim=True) / 6 / two, E4M3) * two
    return (nearest(groups / scale.clamp_min(1e-30), E2M1) * scale).flatten(1)


def largest(module: str) -> float:
    """The number that vLLM takes where modules are fused: the largest of q, k and v, or of all experts."""
    own, _, last = module.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj"):
        return max(number(f"{own}.{each}") for each in ("q_proj", "k_proj", "v_proj"))
    if ".experts." in module:
        experts = own.rpartition(".")[0]
        sides = ("w2",) if last == "w2" else ("w1", "w3")
        return max(number(f"{experts}.{e}.{side}") for e in range(4) for side in sides)
    return number(module)


def plain(module: str, x: Tensor) -> Tensor:
    return x


DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

CASES: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict, Round, str]] = {
    "DeepSeek": (
        released.blocks,
        DEEPSEEK,
        by_group(128),
        "FP8, a scale for 128 channels of a token",
    ),
    "DeepSeek, powers of two": (
        released.blocks,
        DEEPSEEK | {"scale_fmt": "ue8m0"},
        by_group(128, power=True),
        "FP8, a scale for 128 channels of a token, a power of two",
    ),
    "static": (
        released.whole("activation_scale", "weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "static"},
        fixed,
        "FP8, one scale from calibration",
    ),
    "a scale a token": (
        released.whole("input_scale", "weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        by_group(10**6),
        "FP8, a scale a token (vLLM's experts: a scale for all tokens of a batch)",
    ),
    "ModelOpt FP8": (
        released.whole("input_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        fixed,
        "FP8, one scale from calibration",
    ),
    "ModelOpt, channels": (
        released.channels,
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        by_group(10**6),
        "FP8, a scale a token",
    ),
    "ModelOpt MXFP8": (
        released.mx,
        {"quant_method": "modelopt_mxfp8", "quant_algo": "MXFP8"},
        by_group(32, power=True),
        "FP8, a scale for 32 channels of a token, a power of two",
    ),
    "ModelOpt NVFP4": (
        released.nvfp4,
        {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"},
        fp4,
        "NVFP4, a scale for 16 channels of a token and one number from calibration",
    ),
    "ModelOpt W4A16": (
        released.nvfp4,
        {"quant_method": "modelopt_fp4", "quant_algo": "W4A16_NVFP4"},
        plain,
        "as they are",
    ),
    "not said": (
        released.blocks,
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        plain,
        "as they are (activation_scheme is missing)",
    ),
}  # fmt: skip


def reference(model: Path, folder: Path, act: Round, ids: Tensor) -> Tensor:
    """Log-probabilities in float64: transformers' Mixtral with the weights of a folder, whose linears and
    experts round what they are fed."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    weights = {weight.name: weight for weight in open_checkpoint(folder).weights}
    with torch.no_grad():
        for weight in weights.values():
            if not weight.is_expert:
                whole.get_parameter(weight.place.param).copy_(load(weight))
        for name, module in whole.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
                module.register_forward_pre_hook(
                    lambda _, args, at=name: (act(at, args[0].flatten(0, -2)).view_as(args[0]),)
                )
            elif name.endswith(".experts"):
                own = name.removeprefix("model.").replace("mlp.", "")
                sides = [load(weights[f"{own}.{side}"]).double() for side in ("gate", "up", "down")]
                module.forward = experts(sides, name.replace("mlp.", "block_sparse_moe."), act)
        return torch.log_softmax(whole(ids, use_cache=False).logits, -1)


def experts(sides: list[Tensor], name: str, act: Round) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, (gate, up, down) in enumerate(zip(*sides, strict=True)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            fed = act(f"{name}.{expert}.w1", hidden[token])
            between = torch.nn.functional.silu(fed @ gate.T) * (fed @ up.T)
            made = act(f"{name}.{expert}.w2", between) @ down.T
            out.index_add_(0, token, made * gates[token, place, None])
        return out

    return forward


def uneven(model: Path, out: Path) -> Path:
    """A copy whose norms are not all ones: of numbers in bf16 many lie just between two codes, where the last
    bit of a scale decides."""
    shutil.copytree(model, out)
    stored, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in stored:
        if name.endswith("norm.weight"):
            stored[name] = torch.rand(stored[name].shape, generator=generator) + 0.5
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_release_is_scored_with_its_inputs_rounded(tiny, tmp_path: Path, case: str) -> None:
    form, config, act, words = CASES[case]
    model, out, text = uneven(tiny("mixtral"), tmp_path / "model"), tmp_path / "release", rows(4)
    release(model, out, form, config)
    checkpoint = open_checkpoint(model)
    source = open_source(out, checkpoint)
    assert source.inputs is not None
    assert {str(told) for told in source.inputs.values()} == {"as they are", words}
    versions = [
        Version("base", load),
        Version("release", source.provider, Rounded(checkpoint, source.inputs)),
        Version("exact", open_source(out, checkpoint, exact=True).provider),
    ]
    found = compare(checkpoint, versions[0], versions[1:], text, SMALL)
    base = reference(model, model, plain, text.ids)[:, 32:-1]
    for one, rounds in zip(found, (act, plain), strict=True):
        theirs = reference(model, out, rounds, text.ids)[:, 32:-1]
        divergence = (base.exp() * (base - theirs)).sum(-1).flatten()
        assert (one.scores.kl - divergence).abs().mean() < 0.01 * divergence.mean(), one.name
    assert (found[0].scores.kl == found[1].scores.kl).all() == (act is plain)


def test_what_a_config_does_not_say_is_said(tiny, tmp_path: Path, text: Path) -> None:
    form, config, _, words = CASES["not said"]
    cache = {"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}}
    release(tiny("mixtral"), tmp_path / "release", form, config | cache)
    settings = CompareSettings(text, 1024, resources=SMALL)
    found = run(tiny("mixtral"), [tmp_path / "release"], settings)
    assert compare_value(found)["candidates"][0]["activations"] == words
    assert f"release: inputs {words}" in shown(compare_tables(found))
    assert compare_value(found)["candidates"][0]["cache_not_computed"] == "float of 8 bits"
    assert not compare_value(found)["baseline"]["cache_not_computed"]
    assert "release: keys and values as they are; vLLM keeps them in float of 8 bits" in shown(
        compare_tables(found)
    )
    exact = run(tiny("mixtral"), [tmp_path / "release"], replace(settings, exact=True))
    assert compare_value(exact)["candidates"][0]["activations"] == "exact"
    assert "inputs" not in shown(compare_tables(exact))


def shown(tables: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=300).print(tables)
    return out.getvalue()


WHOLE = Inputs("FP8", 0, elsewhere="vLLM's experts: a scale for all tokens of a batch")


def ct(dynamic: bool, **told: object) -> dict[str, Any]:
    """A config of compressed-tensors whose inputs are FP8."""
    inputs = {"num_bits": 8, "type": "float", "dynamic": dynamic} | told
    group = {"targets": ["Linear"], "weights": {}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, Inputs("FP8", 128)),
        ({"quant_method": "modelopt", "quant_algo": "MXFP4"}, "quant_algo MXFP4 does not say"),
        ({"quant_method": "modelopt"}, "modelopt without a quant_algo"),
        ({"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}, Inputs("FP8", 0)),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a.q_proj": {"quant_algo": "W4A16_NVFP4"}},
            },
            Inputs(),
        ),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, Inputs("FP8", 0, most=1200.0)),
        ({"quant_method": "mxfp8"}, Inputs("FP8", 32, power=True)),
        ({"quant_method": "mxfp4"}, Inputs()),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, Inputs()),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "act_bits": 8}, "act_bits 8"),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}, WHOLE),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, WHOLE),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "X"}, "activation_scheme is missing"),
        ({"quant_method": "fp8", "activation_scheme": "other"}, "activation_scheme is other"),
        (DEEPSEEK | {"weight_block_size": [128, -1]}, "weight_block_size is [128, -1]"),
        (ct(True, strategy="group", group_size=64), Inputs("FP8", 64)),
        (ct(True, strategy="token", type="int", symmetric=False), "int of 8 bits with zero points"),
        (ct(True, strategy="group", group_size=-1), "float of 8 bits, group, dynamic: True, which"),
        (ct(True, strategy="tensor"), "float of 8 bits, tensor, dynamic: True, which no runtime"),
        (ct(False, strategy="channel"), "float of 8 bits, channel, dynamic: False, which no runtime"),
    ],
)  # fmt: skip
def test_every_config_says_it_or_not(config: dict[str, Any], expected: Inputs | str) -> None:
    found = inputs_of(read_config(config), "a.q_proj.weight")
    if isinstance(expected, str):
        assert found.untold.startswith(expected) and not found.numbers
    else:
        assert found == expected


def test_the_largest_input_may_be_bounded() -> None:
    x = torch.tensor([[0.5, -3.0, 2000.0, -5000.0]])
    found = rounding(Inputs("FP8", 0, most=1200.0))
    assert found is not None
    scale = 1200 / 448
    assert torch.equal(found(x), (nearest(x.double() / scale, E4M3) * scale).float())


@pytest.mark.parametrize(
    ("value", "says"), [(None, "is missing, by which"), (0.0, "is 0.0, expected a number")]
)
def test_a_number_that_is_none_is_one_line(tiny, tmp_path: Path, value: float | None, says: str) -> None:
    form, config, _, _ = CASES["ModelOpt FP8"]
    out, checkpoint = tmp_path / "release", open_checkpoint(tiny("mixtral"))
    stored = release(tiny("mixtral"), out, form, config)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.input_scale"
    changed = {key: values for key, values in stored.items() if key != name}
    if value is not None:
        changed[name] = torch.tensor(value)
    save_file(changed, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifyError, match=says) as error:
        open_source(out, checkpoint)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert open_source(out, checkpoint, exact=True).inputs is None
