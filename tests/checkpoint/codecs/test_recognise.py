"""Which tensors belong together, and every way in which a config and the tensors can contradict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moequant.checkpoint.codecs import activation_scales, as_shipped, recognise, repack
from moequant.checkpoint.headers import BITS
from moequant.errors import CheckpointError
from tests.checkpoint.codecs.files import one, seeded, write
from tests.evaluate import released

EXPERT = "model.layers.3.mlp.experts.7.up_proj"


def fp8(module: str = EXPERT, n: int = 64) -> dict[str, Tensor]:
    weight = torch.randn(n, n, generator=seeded()).to(torch.float8_e4m3fn)
    return {f"{module}.weight": weight, f"{module}.weight_scale": torch.ones(n, 1)}


def ct(targets: list[str], ignore: list[str] | None = None, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True} | weights
    group = {"targets": targets, "weights": args}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}, "ignore": ignore or []}


def test_plain_and_quantized_side_by_side(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.ones(8, 4).bfloat16(),
        **fp8(),
        "model.norm.weight": torch.ones(4),
        "model.layers.3.mlp.gate.weight": torch.ones(8, 4).half(),
        "model.layers.3.hc.scale": torch.ones(3),
        f"{EXPERT}.input_scale": torch.ones(1),
        "model.layers.3.self_attn.k_proj.k_scale": torch.ones(1),
        "model.layers.3.self_attn.v_scale": torch.ones(1),
    }
    refs = write(tmp_path, tensors)
    config = ct(["Linear"], ["lm_head", r"re:.*mlp\.gate$"])
    found = recognise(refs, config)
    dropped = activation_scales(refs, config)
    assert sorted(found) == sorted(set(tensors) - set(dropped) - {f"{EXPERT}.weight_scale"})
    assert len(dropped) == 3
    assert {name: stored.codec.name for name, stored in found.items() if stored.codec.name != "plain"} == {
        f"{EXPERT}.weight": "fp8"
    }
    assert list(found) == [name for name in refs if name in found]
    assert as_shipped(found["model.embed_tokens.weight"]) == "BF16"
    assert as_shipped(found["model.norm.weight"]) == "F32"
    assert as_shipped(found[f"{EXPERT}.weight"]) is None
    assert repack(found[f"{EXPERT}.weight"], "Q8_0", None, range(64)) is None
    assert repack(found["model.embed_tokens.weight"], "Q4_0", None, range(8)) is None
    assert found[f"{EXPERT}.weight"].bytes == 64 * 64 + 64 * 4


def test_the_group_that_names_a_module_comes_before_the_one_for_its_class(tmp_path: Path) -> None:
    config = ct(["Linear"], num_bits=4, type="int")
    with pytest.raises(CheckpointError, match=r"config_groups\.g says int of 4 bits"):
        one(tmp_path, fp8(), config)
    config["config_groups"]["h"] = ct([r"re:.*experts\.\d+\."])["config_groups"]["g"]
    assert one(tmp_path, fp8(), config).codec.name == "fp8"
    config["config_groups"]["h"] = ct([EXPERT])["config_groups"]["g"]
    assert one(tmp_path, fp8(), config).codec.name == "fp8"


LEFT_OUT = [
    (ct(["Linear"], [EXPERT]), f"quantization_config.ignore has '{EXPERT}'"),
    (ct(["Linear"], [r"re:.*\.experts\."]), "quantization_config.ignore has 're:"),
    ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3"]}, "has 'model.layers.3'"),
    (
        {"quant_method": "fp8", "modules_to_not_convert": [r"model.layers.\d+.mlp"]},
        "modules_to_not_convert has",
    ),
    (
        {"quant_method": "fp8", "ignored_layers": ["up_proj"]},
        "quantization_config.ignored_layers has 'up_proj'",
    ),
    ({"quantization": {"quant_algo": "FP8", "exclude_modules": ["*mlp*"]}}, r"exclude_modules has '\*mlp\*'"),
    (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["model.layers.3*"]},
        "ignore has 'model.lay",
    ),
]


@pytest.mark.parametrize(("config", "message"), LEFT_OUT)
def test_quantized_but_left_out(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor {EXPERT}.weight is quantized, but .*{message}"):
        one(tmp_path, fp8(), config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        ct(["Linear"], ["model.layers.3", "up_proj", "re:experts"]),
        {
            "quant_method": "fp8",
            "weight_block_size": [1, 64],
            "modules_to_not_convert": ["model.layers.30", "gate", "proj", "mlp", "*"],
        },
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": None},
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "mlp"]}},
        {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
        {
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {EXPERT: {"quant_algo": "FP8"}},
            }
        },
    ],
)
def test_names_that_only_look_alike(tmp_path: Path, config: dict[str, Any]) -> None:
    assert one(tmp_path, fp8(), config).codec.name == "fp8"


CONTRADICTED = [
    (
        ct(["Linear"], type="int"),
        f"{EXPERT}.weight holds float of 8 bits, but .*config_groups.g says int of 8",
    ),
    (ct(["Linear"], strategy="tensor"), r"weight_scale is \[64, 1\] .* expected blocks of \[0, 0\]"),
    (
        ct(["Linear"], strategy="group", group_size=32),
        r"weight_scale is \[64, 1\] .* expected blocks of \[1, 32\]",
    ),
    (ct(["re:.*attn.*"]), "no targets of quantization_config.config_groups name it"),
    (ct(["Linear"], symmetric=False), "has no zero point, but .*config_groups.g says symmetric: false"),
    (
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        r"weight_scale is \[64, 1\] .* blocks of \[32, 32\]",
    ),
    (
        {"quantization": {"quant_algo": "NVFP4"}},
        "holds float of 8 bits, but quant_algo NVFP4 says float of 4",
    ),
    (
        {"quantization": {"quant_algo": "FP8", "quantized_layers": {EXPERT: {"quant_algo": "MXFP4"}}}},
        "quant_algo MXFP4 says float of 4 bits",
    ),
    ({"quantization": {"quant_algo": "W4A8_AWQ"}}, "quant_algo is W4A8_AWQ, expected one of FP8"),
    (
        {"quant_method": "bitsandbytes"},
        "quant_method is bitsandbytes, expected one of fp8, .* and 4 more",
    ),
    ({"load_in_4bit": True}, "quant_method is missing, expected one of"),
    (
        ct(["Linear"]) | {"transform_config": {"config_groups": {"R1": {}}}},
        "transform_config: weights are stored tu",
    ),
    (ct(["Linear"]) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format is sparse-24-bitmask"),
]


@pytest.mark.parametrize(("config", "message"), CONTRADICTED)
def test_otherwise_than_declared(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        one(tmp_path, fp8(), config)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_bits_that_do_not_fit_the_words(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(8, 16, dtype=torch.int32),
        "a.weight_scale": torch.ones(8, 4).half(),
        "a.weight_shape": torch.tensor([8, 128]),
    }
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    assert one(tmp_path, tensors, ct(["Linear"], **four)).codec.name == "int4"
    with pytest.raises(
        CheckpointError, match=r"a.weight_packed has 16 words for each 128 weights .*\.g says 8 bits"
    ):
        one(tmp_path, tensors, ct(["Linear"], **four | {"num_bits": 8}))
    with pytest.raises(CheckpointError, match=r"\.g says 16 bits"):
        one(tmp_path, tensors, ct(["Linear"], **four | {"num_bits": 16}))
    del tensors["a.weight_shape"]
    assert one(tmp_path, tensors, ct(["Linear"], **four)).shape == (8, 128)
    with pytest.raises(CheckpointError, match=r"a.weight_shape is missing"):
        one(tmp_path, tensors)


LEFT_OVER = [
    ({"a.weight_scale_inv": torch.ones(2, 2)}, "a.weight_scale_inv is F32"),
    ({"a.weight": torch.ones(4, 4).bfloat16(), "a.weight_scale": torch.ones(4, 1)}, "a.weight_scale is F32"),
    ({"a.qzeros": torch.ones(4, 4, dtype=torch.int32)}, "a.qzeros is I32"),
    ({"a.scale": torch.ones(4, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, "a.scale is F8_E8M0"),
    ({"a.weight.absmax": torch.ones(4), "a.weight": torch.ones(4, 4)}, "a.weight.absmax is F32"),
    ({"a.pre_quant_scale": torch.ones(4)} | fp8("a"), "a.pre_quant_scale is F32"),
    ({"a.weight_scale_inv": torch.ones(64, 1)} | fp8("a"), "a.weight_scale is F32"),
    ({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "a.weight is stored as F8_E4M3 without scales"),
    (
        {"a.weight": torch.ones(4, dtype=torch.int8), "a.weight_scale": torch.ones(1)},
        "expected a matrix or a st",
    ),
    (
        {"a.weight": torch.ones(4, 64).half()}
        | {"a.weight_packed": torch.ones(4, 8, dtype=torch.int32), "a.weight_scale": torch.ones(4, 1)}
        | {"a.weight_shape": torch.tensor([4, 64])},
        "a.weight is stored twice",
    ),
    ({"e.x_blocks": torch.ones(2, 4, 8), "e.x_scales": torch.ones(2, 4)}, r"e.x_blocks is F32 \[2, 4, 8\]"),
    (
        {
            "e.x_blocks": torch.ones(2, 4, 8, 16, dtype=torch.uint8),
            "e.x_scales": torch.ones(2, 4, 7, dtype=torch.uint8),
        },
        r"e.x_scales is \[2, 4, 7\] for a weight of \[2, 4, 256\], expected U8 \[2, 4, 8\]",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), LEFT_OVER)
def test_parts_alone(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        recognise(write(tmp_path, tensors), None)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


FORMS: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "blocks": (released.blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "whole": (released.whole("input_scale"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "channels": (released.channels, {"quant_method": "fbgemm_fp8"}),
    "nvfp4": (released.nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "gptq": (released.gptq(3, 32), {"quant_method": "gptq", "bits": 3, "group_size": 32}),
    "awq": (released.awq, {"quant_method": "awq", "bits": 4, "group_size": 64}),
    "integers": (released.packed, ct(["Linear"], num_bits=4, type="int", strategy="group", group_size=64)),
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_another_type_are_no_such_parts(tmp_path: Path, form: str) -> None:
    """Every part under every other type of as many bits: whole numbers are no scales, floats no codes, and
    what torch has no such type for is no traceback. Two types of floats cannot be told apart."""
    make, config = FORMS[form]
    weight = torch.randn(128, 128, generator=seeded())
    refs = write(tmp_path, {f"{EXPERT}.{key}": part for key, part in make(EXPERT, weight).items()})
    kept = set()
    for name, ref in refs.items():
        for other, bits in BITS.items():
            if bits != BITS[ref.dtype] or other == ref.dtype or name.endswith("input_scale"):
                continue
            try:
                (stored,) = recognise(refs | {name: replace(ref, dtype=other)}, config).values()
                stored.read()
                kept.add((ref.dtype, other))
            except CheckpointError as error:
                assert "\n" not in str(error)
    assert kept <= {("F16", "BF16")}
