"""Variants of what ModelOpt, auto-round, GPTQModel and llm-compressor write, against the formula in float64
or compressed-tensors' own code; and what is refused, by the key that says it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from torch import Tensor, nn

from moequant.checkpoint.codecs import activation_scales, recognise
from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.codecs.inputs import inputs_of
from moequant.errors import CheckpointError
from tests.checkpoint.codecs import test_compressed_tensors as ct
from tests.checkpoint.codecs.files import read, seeded, write
from tests.checkpoint.codecs.test_gptq_awq import awq, config, gptq

LAYER = "model.layers.0"
EXPERT, QUERY, GATE = f"{LAYER}.mlp.experts.1.up_proj", f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.gate"

FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
PER_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module under another name."""
    return {f"{name}.{key.rpartition('.')[2]}": tensor for key, tensor in tensors.items()}


def check(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], expected: dict[str, Tensor]
) -> None:
    """Every weight has the values in float64, up to one rounding to F32."""
    found = recognise(write(folder, tensors), config)
    for name, weight in expected.items():
        assert torch.equal(read(found[f"{name}.weight"]), weight.float()), name


@pytest.mark.parametrize(
    "config",
    [
        {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8",
                "exclude_modules": ["lm_head", "*mlp.gate"],
            },
        },
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_scheme": FLOAT8,
            "ignore": ["lm_head", "model.layers.*.mlp.gate*"],
            "config_groups": {
                "group_0": {"weights": FLOAT8, "input_activations": FLOAT8, "targets": ["Linear"]}
            },
        },
    ],
)
def test_modelopts_fp8_with_scales_of_the_cache(tmp_path: Path, config: dict[str, Any]) -> None:
    codes = torch.randn(48, 64, generator=seeded()).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.0371)
    aside = {
        f"{EXPERT}.input_scale": torch.ones(()),
        f"{LAYER}.self_attn.k_proj.k_scale": torch.ones(()),
        f"{LAYER}.self_attn.v_proj.v_scale": torch.ones(()),
    }
    plain = {"lm_head.weight": torch.ones(4, 64).bfloat16(), f"{GATE}.weight": torch.ones(4, 64).bfloat16()}
    tensors = {f"{EXPERT}.weight": codes, f"{EXPERT}.weight_scale": scale, **aside, **plain}
    check(tmp_path, tensors, config, {EXPERT: codes.double() * scale.double()})
    refs = write(tmp_path, tensors)
    assert set(activation_scales(refs, config)) == set(aside)
    assert {name for name, stored in recognise(refs, config).items() if stored.codec.name == "plain"} == set(
        plain
    )


def test_auto_round_with_bits_by_layer(tmp_path: Path) -> None:
    """Names and expressions of `extra_config`, in its own packing and in GPTQ's."""
    other = f"{LAYER}.mlp.experts.0.up_proj"
    made = {QUERY: (8, 64), other: (2, 32), EXPERT: (4, 32)}
    told = {
        QUERY: {"bits": 8, "group_size": 64, "act_bits": 8},
        r".*experts\.0\..*": {"bits": 2},
        GATE: {"bits": 16, "data_type": "fp"},
    }
    for packing, version in (("auto_round:auto_gptq", 1), ("auto_round:gptqmodel", 2)):
        parts = {name: gptq(bits, 64, 128, group, version=version) for name, (bits, group) in made.items()}
        tensors = {key: part for name, (each, _) in parts.items() for key, part in under(name, each).items()}
        told_all = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
        whole = told_all | {"packing_format": packing, "extra_config": told}
        tensors[f"{GATE}.weight"] = torch.ones(4, 64).bfloat16()
        check(tmp_path, tensors, whole, {name: weight for name, (_, weight) in parts.items()})
    assert "act_bits 8" in str(inputs_of(read_config(whole), f"{QUERY}.weight"))
    assert str(inputs_of(read_config(whole), f"{EXPERT}.weight")) == "as they are"


def test_gptqmodel_says_it_of_some_modules(tmp_path: Path) -> None:
    """The first entry that fits counts, also before one that leaves modules out; an order of columns is asked
    for by module too, and the head is like any other."""
    in_turn, weight = gptq(4, 64, 128, 32, version=2)
    ordered, mixed = gptq(8, 64, 128, 64, version=2, act_order=True)
    del in_turn["m.q_proj.g_idx"]
    tensors = under(QUERY, in_turn) | under(EXPERT, ordered) | under("lm_head", ordered)
    dynamic = {
        "+:.*q_proj": {"desc_act": False},
        f"+:{EXPERT}|lm_head": {"bits": 8, "group_size": 64},
        rf"-:{LAYER}\..*": {},
    }
    told = config(4, 32, checkpoint_format="gptq_v2", desc_act=True, lm_head=True, dynamic=dynamic)
    check(tmp_path, tensors, told, {QUERY: weight, EXPERT: mixed, "lm_head": mixed})
    told["dynamic"] = dict(reversed(dynamic.items()))
    with pytest.raises(CheckpointError, match=r"_proj.weight is quantized, but .*dynamic has '-:model"):
        recognise(write(tmp_path, tensors), told)


INTS, FLOATS = ct.scheme(4, "int", "group", group_size=32), ct.scheme(8, "float", "channel")


def group(targets: list[str], scheme: Any, **more: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": scheme.weights.model_dump(mode="json"), **more}


SETS = [
    {"a": [r"re:.*experts\.\d+\."], "b": ["re:.*self_attn.*"], "c": ["Linear"]},
    {"a": ["re:.*proj"], "b": [QUERY], "c": ["Embedding"]},
    {"a": ["Linear"], "b": ["Embedding"]},
    {"a": ["re:model.*", "Linear"], "b": [r"re:.*up_proj$", "model.embed_tokens"]},
    {"a": ["Linear"], "b": ["Linear"], "c": ["re:.*embed.*"]},
    {"a": ["Linear"], "b": ["DeepseekV3Attention"]},
]


@pytest.mark.parametrize("sets", SETS)
def test_groups_are_chosen_as_compressed_tensors_chooses_them(sets: dict[str, list[str]]) -> None:
    modules: dict[str, nn.Module] = {
        QUERY: nn.Linear(2, 2), EXPERT: nn.Linear(2, 2), "model.embed_tokens": nn.Embedding(2, 2)
    }  # fmt: skip
    scheme_of: OrderedDict[str, str] = OrderedDict()
    for name, targets in sets.items():
        scheme_of |= dict.fromkeys(targets, name)
    groups = {name: group(targets, INTS) for name, targets in sets.items()}
    declared = read_config({"quant_method": "compressed-tensors", "config_groups": groups})
    for module, made in modules.items():
        theirs = match_targets(module, made, scheme_of)
        if theirs:
            found = declared.group(f"{module}.weight")
            assert found is not None and found[0] == scheme_of[theirs[0]], module
        elif module == QUERY:
            with pytest.raises(CheckpointError, match="no targets of quantization_config"):
                declared.group(f"{module}.weight")


def test_groups_of_several_formats(tmp_path: Path) -> None:
    """Integers and floats side by side, and a table: by an expression, a name before it, and a class."""
    ints = ct.compressed("pack-quantized", INTS, 64, 64, torch.float32)
    floats = ct.compressed("float-quantized", FLOATS, 64, 64, torch.float32)
    tensors = under(EXPERT, ints) | under(QUERY, floats) | under("model.embed_tokens", floats)
    whole = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": group(["re:.*proj$"], INTS, format="pack-quantized"),
            "b": group([QUERY], FLOATS, input_activations=PER_TOKEN, output_activations=PER_TOKEN),
            "c": group(["Embedding"], FLOATS, format="float-quantized"),
        },
    }
    found = recognise(write(tmp_path, tensors), whole)
    assert torch.equal(read(found[f"{EXPERT}.weight"]), ct.theirs("pack-quantized", INTS, ints))
    for name in (QUERY, "model.embed_tokens"):
        assert torch.equal(read(found[f"{name}.weight"]), ct.theirs("float-quantized", FLOATS, floats))
    told = str(inputs_of(read_config(whole), f"{QUERY}.weight"))
    assert told == "FP8, a scale a token (compressed-tensors: outputs are rounded too)"


GPTQ = config(4, 32)
CT = {"quant_method": "compressed-tensors", "config_groups": {"a": group(["Linear"], INTS)}}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is int16, expected int32"),
        (GPTQ | {"rotation": "hadamard"}, "quantization_config.rotation: weights are stored turned"),
        (
            ROUND | {"rotation_config": {"algorithm": "hadamard"}},
            "rotation_config: weights are stored turned",
        ),
        (ROUND | {"spinquant_config": {"r4": True}}, "spinquant_config: weights are stored turned"),
        (ROUND | {"hadamard_config": {"block_size": 32}}, "hadamard_config: weights are stored turned"),
        (CT | {"format": "marlin-24"}, "quantization_config.format is marlin-24, expected one of dense"),
        (CT | {"format": "spiral"}, "quantization_config.format is spiral, expected one of"),
        (
            CT | {"config_groups": {"b": group(["Linear"], INTS, format="spiral")}},
            "config_groups.b.format is spiral, expected one of",
        ),
        (
            CT | {"config_groups": {"W4A16": ["Linear"]}},
            r"config_groups.W4A16 is \['Linear'\], expected an obj",
        ),
        (CT | {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config.format is sparse-bitmask"),
        ({"quantization": {"quant_algo": "NVFP4_AWQ"}}, "quant_algo is NVFP4_AWQ, expected one of"),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo is W4A16_AWQ, expected one of"),
        ({"quant_method": "torchao", "quant_type": {}}, "quant_method is torchao, expected one of"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    """Though the tensors look like those of another form."""
    floats = {
        "m.q_proj.weight": torch.ones(4, 64).to(torch.float8_e4m3fn),
        "m.q_proj.weight_scale": torch.ones(1),
    }
    packed = ct.compressed("pack-quantized", INTS, 64, 64, torch.float32)
    method = config.get("quant_method")
    tensors = gptq(4, 64, 128, 32)[0] if method in ("gptq", "auto-round") else floats
    tensors = under("m.q_proj", packed) if method == "compressed-tensors" else tensors
    with pytest.raises(CheckpointError, match=message) as caught:
        recognise(write(tmp_path, tensors), config)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_rotations_that_are_none_are_no_reason(tmp_path: Path) -> None:
    tensors, weight = gptq(4, 64, 128, 32)
    told = GPTQ | {"rotation": None, "pack_dtype": "int32", "transform_config": {}}
    check(tmp_path, tensors, told, {"m.q_proj": weight})
    tensors, weight = awq(64, 128, 64)
    told = ROUND | {"packing_format": "auto_round:auto_awq", "group_size": 64, "rotation_config": {}}
    check(tmp_path, tensors, told, {"m.o": weight})
    with pytest.raises(
        CheckpointError, match=r"m.o.weight holds int of 4 bits, but .*extra_config\['m.o'\] says"
    ):
        recognise(write(tmp_path, tensors), told | {"extra_config": {"m.o": {"bits": 8}}})
