"""The form of one quantized weight: its shape, its codec, and its parts as the codec wants them.

Each function takes the plain name, the parts by key and what the config declares, and raises
CheckpointError where they do not fit together. Only headers are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.checkpoint.codecs import bits, mxfp4, mxfp6, nvfp4
from moequant.checkpoint.codecs.awq import Awq
from moequant.checkpoint.codecs.base import read_part
from moequant.checkpoint.codecs.declared import Declared, Scheme, disagrees
from moequant.checkpoint.codecs.eight_bit import EightBit
from moequant.checkpoint.codecs.gptq import Gptq
from moequant.checkpoint.codecs.mxfp4 import Mxfp4
from moequant.checkpoint.codecs.mxfp6 import Mxfp6
from moequant.checkpoint.codecs.nvfp4 import Nvfp4, Nvfp4Across
from moequant.checkpoint.codecs.packed_int import PackedInt
from moequant.checkpoint.codecs.scales import Grid, as_grid, fit, misfit
from moequant.errors import CheckpointError
from moequant.values import Stored, TensorRef

Parts = Mapping[str, TensorRef]

_RANKS = (4, 8)
"""Over how many ranks MiMo's qkv_proj may have been spread."""


def eight_bit(name: str, parts: Parts, scheme: Scheme) -> Stored:
    """FP8, INT8 or MXFP8."""
    weight = parts["weight"]
    shape, is_int = weight.shape, weight.dtype == "I8"
    # Integers of fewer bits lie in bytes too.
    scheme.check(name, min(scheme.bits or 8, 8) if is_int else 8, "int" if is_int else "float")
    # Behind a stack's own name ModelOpt puts this: it turns such a stack, scales its rows and turns it back.
    turned = parts["scale"].name == f"{name}_weight_scale"
    scale = as_grid(parts["scale"], shape, turned)
    grid = _ranks(name, scale, shape) if name.endswith("qkv_proj.weight") else None
    if scheme.block == (0, 0) and scheme.bits is None and scale.shape[-2:] != (1, 1):
        # Without the key vLLM wants one number a matrix, and transformers squares of 128 or else fails.
        raise disagrees(
            scale.name,
            f"is {list(parts['scale'].shape)} for a weight of {list(shape)}",
            "quantization_config has no weight_block_size, which is for one number a matrix",
        )
    if grid is None:
        # One number for all is DeepSeek's form of "per tensor", whatever the block size says.
        alone = len(parts["scale"].shape) < 2 and scale.shape[-2:] == (1, 1) and scheme.bits is None
        grid = fit(scale, shape, (0, 0) if alone else scheme.block)
    kept = {"weight": weight, "scale": scale}
    if "zero_point" in parts:
        zero = parts["zero_point"]
        kept["zero_point"] = replace(as_grid(zero, shape, turned), dtype=zero.dtype)
        if kept["zero_point"].shape != scale.shape:
            raise misfit(zero, shape, f"{list(scale.shape)} as its scales")
    elif scheme.symmetric is False:
        raise _no_zero_point(name, scheme)
    power = scale.dtype == "F8_E8M0"
    label = "int8" if is_int else "mxfp8" if power and (grid.rows, grid.columns) == (1, 32) else "fp8"
    return Stored(name, shape, "BF16" if power else "F32", kept, EightBit(label, grid))


def _ranks(name: str, scale: TensorRef, shape: tuple[int, ...]) -> Grid | None:
    """MiMo's fused qkv: blocks of 128 rows that start anew with each rank; None when they do not."""
    rows, count = shape[-2], scale.shape[-2]
    if -(-rows // 128) == count or len(shape) != 2 or count == 1:
        return None
    fitting = [n for n in _RANKS if rows % n == 0 and n * -(-(rows // n) // 128) == count]
    if len(fitting) > 1:
        raise misfit(scale, shape, f"scales of so many ranks as only one of {fitting} has")
    if not fitting or -(-shape[-1] // 128) != scale.shape[-1]:
        return None
    return Grid(128, 128, rows // fitting[0])


def packed_int(name: str, parts: Parts, scheme: Scheme) -> Stored:
    """compressed-tensors' packed integers."""
    weight = parts["weight"]
    n_in = _columns(name, parts, scheme)
    shape = (*weight.shape[:-1], n_in)
    width, dense = _packing(name, weight, n_in, scheme)
    scheme.check(name, width, "int")
    scale = as_grid(parts["scale"], shape)
    grid = fit(scale, shape, scheme.block)
    kept = dict(parts) | {"scale": scale}
    if "zero_point" in parts:
        kept["zero_point"] = _packed_zeros(parts["zero_point"], scale, shape, (width, dense))
    elif scheme.symmetric is False:
        raise _no_zero_point(name, scheme)
    if "g_idx" in parts and parts["g_idx"].shape != (n_in,):
        raise misfit(parts["g_idx"], shape, f"[{n_in}], a group for each column")
    return Stored(name, shape, "F32", kept, PackedInt(width, dense, grid))


def _columns(name: str, parts: Parts, scheme: Scheme) -> int:
    """Weights in a row: from the groups that the config declares, else from the file."""
    if scheme.block and scheme.block[1]:
        return parts["scale"].shape[-1] * scheme.block[1]
    if "shape" not in parts:
        raise CheckpointError(
            f"tensor {parts['weight'].name}: {name}_shape is missing, expected beside it; is the download "
            "complete?"
        )
    return int(read_part(parts["shape"])[-1])


def _packing(name: str, weight: TensorRef, n_in: int, scheme: Scheme) -> tuple[int, bool]:
    """Bits, and whether codes straddle words, that put n_in codes into a row; dense where both fit."""
    words = weight.shape[-1]
    widths = range(2, 9) if scheme.bits is None else (scheme.bits,) if 2 <= scheme.bits <= 8 else ()
    ways = [(width, dense) for dense in (True, False) for width in widths]
    fitting = [way for way in ways if bits.words_for(n_in, *way) == words]
    if not fitting or len({width for width, _ in fitting}) > 1:
        said = f"{scheme.source} says {scheme.bits} bits" if scheme.bits else "no config says how many bits"
        raise disagrees(weight.name, f"has {words} words for each {n_in} weights of {name}", said)
    return fitting[0]


def _packed_zeros(
    ref: TensorRef, scale: TensorRef, shape: tuple[int, ...], packing: tuple[int, bool]
) -> TensorRef:
    """Zero points as the codec reads them: packed along the rows, or one by one in I8."""
    if ref.dtype == "I8":
        zeros = as_grid(ref, shape)
        if zeros.shape == scale.shape:
            return zeros
    elif ref.dtype == "I32":
        wanted = (*scale.shape[:-2], bits.words_for(shape[-2], *packing), scale.shape[-1])
        if scale.shape[-2] == shape[-2] and ref.shape == wanted:
            return ref
    raise misfit(ref, shape, f"a zero point for each scale {list(scale.shape)}, packed along its rows")


def is_mxfp4(parts: Parts) -> bool:
    """Whether bytes hold two codes each: their scales are powers of two, for 16 bytes."""
    weight, scale = parts["weight"], parts.get("scale")
    if scale is None or scale.dtype not in ("U8", "F8_E8M0"):
        return False
    return scale.shape == (*weight.shape[:-1], -(-weight.shape[-1] * 2 // mxfp4.BLOCK))


def fp4(name: str, parts: Parts, scheme: Scheme) -> Stored:
    """MXFP4, MXFP6 or NVFP4: the type and number of scales tell them apart."""
    weight, scale = parts["weight"], parts["scale"]
    shape = (*weight.shape[:-1], weight.shape[-1] * 2)
    if scale.dtype not in ("U8", "F8_E8M0", "F8_E4M3"):
        raise CheckpointError(
            f"tensor {scale.name} is {scale.dtype} for the bytes of {weight.name}, expected F8_E4M3 (NVFP4) "
            "or U8 (MXFP4); give a checkpoint of a form that moequant reads"
        )
    if weight.shape[-1] == scale.shape[-1] * mxfp6.BLOCK * 3 // 4 and scale.dtype != "F8_E4M3":
        return _fp6(name, parts, scheme)
    nv = scale.dtype == "F8_E4M3"
    block = nvfp4.BLOCK if nv else mxfp4.BLOCK
    scheme.check(name, 4, "float", block)
    if across := nv and _is_across(weight, scale):
        shape = (shape[0], weight.shape[1] * 2, weight.shape[2])
    elif scale.shape != (*shape[:-1], shape[-1] // block) or shape[-1] % block:
        raise misfit(scale, shape, f"a scale for each {block} weights of a row")
    if not nv:
        kept = {"weight": weight, "scale": replace(scale, dtype="F8_E8M0")}
        return Stored(name, shape, "BF16", kept, Mxfp4())
    if "global_scale" not in parts:
        raise CheckpointError(
            f"tensor {scale.name}: {name}_scale_2 or {name}_global_scale is missing, expected beside it; "
            "is the download complete?"
        )
    whole = as_grid(parts["global_scale"], shape)
    if whole.shape[-2:] != (1, 1):
        raise misfit(whole, shape, "one number for each matrix")
    kept = {"weight": weight, "scale": scale, "global_scale": whole}
    divides = whole.name.endswith("_global_scale")
    if across and divides:  # compressed-tensors packs along rows
        raise misfit(scale, shape, f"a scale for each {block} weights of a row")
    if across:
        return Stored(name, shape, "F32", kept, Nvfp4Across())
    return Stored(name, shape, "F32", kept, Nvfp4(divides))


def _is_across(weight: TensorRef, scale: TensorRef) -> bool:
    """Whether a stack is [E, in, out], packed along `in`."""
    if len(weight.shape) != 3 or len(scale.shape) != 3:
        return False
    experts, half, n_out = weight.shape
    return scale.shape == (experts, half * 2 // nvfp4.BLOCK, n_out) and half * 2 % nvfp4.BLOCK == 0


def _fp6(name: str, parts: Parts, scheme: Scheme) -> Stored:
    weight, scale = parts["weight"], parts["scale"]
    shape = (*weight.shape[:-1], scale.shape[-1] * mxfp6.BLOCK)
    scheme.check(name, 6, "float", mxfp6.BLOCK)
    if scale.shape[:-1] != weight.shape[:-1]:
        raise misfit(scale, shape, f"a scale for each {mxfp6.BLOCK} weights of a row")
    kept = {"weight": weight, "scale": replace(scale, dtype="F8_E8M0")}
    return Stored(name, shape, "BF16", kept, Mxfp6(3 if scheme.numbers == "fp6_e3m2" else 2))


def gpt_oss(name: str, parts: Parts) -> Stored:
    """gpt-oss's experts: [E, out, in / 32, 16] bytes, rows as they are stored."""
    weight, scale = parts["weight"], parts["scale"]
    if weight.dtype != "U8" or len(weight.shape) != 4 or weight.shape[-1] != 16:
        raise CheckpointError(
            f"tensor {name} is {weight.dtype} {list(weight.shape)}, expected U8 [experts, out, in / 32, 16]; "
            "download it again"
        )
    experts, rows, blocks, size = weight.shape
    shape = (experts, rows, blocks * mxfp4.BLOCK)
    if scale.dtype != "U8" or scale.shape != weight.shape[:-1]:
        raise misfit(scale, shape, f"U8 {list(weight.shape[:-1])}")
    kept = {
        "weight": replace(weight, shape=(experts, rows, blocks * size)),
        "scale": replace(scale, dtype="F8_E8M0"),
    }
    return Stored(name, shape, "BF16", kept, Mxfp4())


def quark_int(name: str, parts: Parts, declared: Declared, scheme: Scheme) -> Stored:
    """Quark's integers of 4 bits in groups: [in, out / 8], and scales turned likewise."""
    weight, scale = parts["weight"], parts["scale"]
    if scheme.numbers not in ("int4", "uint4"):
        said = f"{scheme.source} says {scheme.numbers}" if scheme.numbers else "no Quark config says which"
        raise disagrees(weight.name, "holds words of several numbers", said)
    scheme.check(name, 4, "int")
    if (len(weight.shape), len(scale.shape)) != (2, 2) or -(-scale.shape[1] // 8) != weight.shape[1]:
        raise misfit(scale, weight.shape, f"[groups, out] for the words [in, out / 8] of {weight.name}")
    n_in, n_out = weight.shape[0], scale.shape[1]
    zeros = parts.get("zero_point")
    if zeros is not None and (zeros.dtype != "I32" or zeros.shape != (scale.shape[0], weight.shape[1])):
        raise misfit(
            zeros, (n_out, n_in), f"I32 {[scale.shape[0], weight.shape[1]]}, eight zero points a word"
        )
    if zeros is None and scheme.symmetric is False:
        raise _no_zero_point(name, scheme)
    ordered = (declared.raw.get("export") or {}).get("pack_method") == "order"
    codec = Awq(
        _group(scale, n_in, scheme),
        bool(scheme.symmetric),
        reordered=not ordered,
        signed=scheme.numbers == "int4",
        name=scheme.numbers,
    )
    return Stored(name, (n_out, n_in), "F32", dict(parts), codec)


def transposed(name: str, parts: Parts, declared: Declared, scheme: Scheme) -> Stored:
    """GPTQ or AWQ, which their tensors do not tell apart for certain: the config does."""
    if declared.method not in ("gptq", "awq"):
        raise CheckpointError(
            f"tensor {parts['weight'].name}: quant_method is {declared.method or 'missing'}, expected gptq "
            "or awq; add quantization_config to config.json (or quantize_config.json)"
        )
    for key, suffix in (("zero_point", "qzeros"), ("scale", "scales")):
        if key not in parts or len(parts[key].shape) != 2:
            raise CheckpointError(
                f"tensor {parts['weight'].name}: {suffix} is missing or no matrix, expected beside it; "
                "is the download complete?"
            )
    if declared.method == "awq":
        return _awq(name, parts, declared, scheme)
    return _gptq(name, parts, declared, scheme)


def _gptq(name: str, parts: Parts, declared: Declared, scheme: Scheme) -> Stored:
    version = str(declared.raw.get("checkpoint_format") or declared.raw.get("format") or "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"quantization_config.checkpoint_format is {version}, expected gptq or gptq_v2; give the "
            "unquantized checkpoint"
        )
    weight, zeros, scale = parts["weight"], parts["zero_point"], parts["scale"]
    count, n_out = scale.shape
    width = zeros.shape[1] * 32 // n_out
    if width not in (2, 3, 4, 8) or zeros.shape != (count, n_out * width // 32) or weight.shape[1] != n_out:
        raise misfit(zeros, (*weight.shape,), f"[groups, out · bits / 32] beside scales {list(scale.shape)}")
    scheme.check(name, width, "int")
    n_in = weight.shape[0] * 32 // width
    group = _group(scale, n_in, scheme)
    if "g_idx" in parts and parts["g_idx"].shape != (n_in,):
        raise misfit(parts["g_idx"], (n_out, n_in), f"[{n_in}], a group for each channel")
    desc_act = declared.setting(name.removesuffix(".weight"), "desc_act")
    if "g_idx" not in parts and desc_act:
        raise CheckpointError(f"tensor {weight.name}: g_idx is missing, but desc_act is set; is it complete?")
    act_order = bool(desc_act) and group < n_in
    codec = Gptq(width, group, version == "gptq", bool(scheme.symmetric), act_order)
    return Stored(name, (n_out, n_in), "F32", dict(parts), codec)


def _awq(name: str, parts: Parts, declared: Declared, scheme: Scheme) -> Stored:
    version = str(declared.raw.get("version") or declared.raw.get("format") or "gemm").lower()
    if version != "gemm":
        raise CheckpointError(
            f"quantization_config.version is {version}, expected gemm; give the unquantized checkpoint"
        )
    weight, zeros, scale = parts["weight"], parts["zero_point"], parts["scale"]
    n_in, n_out = weight.shape[0], weight.shape[1] * 8
    scheme.check(name, 4, "int")
    if "g_idx" in parts:
        raise misfit(parts["g_idx"], (n_out, n_in), "no g_idx with AWQ")
    if scale.shape[1] != n_out or zeros.shape != (scale.shape[0], weight.shape[1]):
        raise misfit(scale, (n_out, n_in), f"[groups, {n_out}] beside qzeros {list(zeros.shape)}")
    codec = Awq(_group(scale, n_in, scheme), bool(scheme.symmetric))
    return Stored(name, (n_out, n_in), "F32", dict(parts), codec)


def _group(scale: TensorRef, n_in: int, scheme: Scheme) -> int:
    """Weights of a row that share a scale; scales are [groups, out]."""
    count = scale.shape[0]
    size = (scheme.block[1] or n_in) if scheme.block else -(-n_in // count)
    if -(-n_in // size) != count:
        raise misfit(scale, (scale.shape[1], n_in), f"{-(-n_in // size)} groups of {size} ({scheme.source})")
    return size


def _no_zero_point(name: str, scheme: Scheme) -> CheckpointError:
    return disagrees(name, "has no zero point", f"{scheme.source} says symmetric: false")
