"""What is not quantized under `check`: norms, routers, whole matrices, keys of header and config.json."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from moequant.check.figures import CheckReport
from moequant.check.plain import PIECE, misfit
from moequant.check.source import Plain
from moequant.checkpoint import load, open_checkpoint
from moequant.commands.check import CheckSettings, check
from moequant.commands.convert import Settings, convert
from moequant.errors import MoequantError, VerifyError
from tests.containers.folders.cases import quantized
from tests.evaluate import released

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_experts": 4}

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model, and a file of it where all matrices are BF16 but for the experts."""
    model, out = tiny("qwen3_moe", **SIZES), tmp_path_factory.mktemp("made") / "made.gguf"
    wanted = {"type": "BF16", "tensor_type": ("experts=Q4_0",)}
    settings = Settings(**wanted, calib=text, calib_tokens=1024, eval_tokens=0, effort="fast")
    convert(model, out, settings)
    return model, out


def checked(out: Path, model: Path | None, text: Path) -> CheckReport:
    return check(out, CheckSettings(model, device="cpu", calib=text, tokens=512))


def said(report: CheckReport) -> dict[str, str]:
    return {damage.where: damage.what for damage in report.damages}


def copied(file: Path, folder: Path, *, known: bool) -> Path:
    """A copy of a file; not `known`, nobody finds its checksums."""
    copy = Path(shutil.copy(file, folder / "copy.gguf"))
    if not known:
        copy.write_bytes(copy.read_bytes().replace(b"moequant.crc32", b"nobody's.crc32"))
    return copy


def edited(file: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    reader = gguf.GGUFReader(file, "r+")
    edit({tensor.name: tensor.data for tensor in reader.tensors})
    reader.data.flush()


def with_key(file: Path, key: str, value: float) -> None:
    reader = gguf.GGUFReader(file, "r+")
    field = reader.get_field(key)
    field.parts[field.data[0]][0] = value
    reader.data.flush()


def swap(tensors: dict[str, np.ndarray]) -> None:
    one, two = tensors["blk.0.attn_q.weight"], tensors["blk.1.attn_q.weight"]
    one[:], two[:] = two.copy(), one.copy()


def one_norm(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_norm.weight"][5] *= 1.1


def router(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_gate_inp.weight"][:] *= 1.05


def no_number(tensors: dict[str, np.ndarray]) -> None:
    tensors["output_norm.weight"][3] = np.nan


def test_numbers_of_a_file_are_the_model_s(made: Made, text: Path, tmp_path: Path) -> None:
    """Of a file without checksums, as any other tool makes it."""
    model, file = made
    assert not checked(copied(file, tmp_path, known=False), model, text).damages
    for edit, wrong in (
        (swap, {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}),
        (one_norm, {"blk.1.ffn_norm.weight"}),
        (router, {"blk.0.ffn_gate_inp.weight"}),
        (no_number, {"output_norm.weight"}),
    ):
        copy = copied(file, tmp_path, known=False)
        edited(copy, edit)
        found = said(checked(copy, model, text))
        assert wrong == {where for where in found if "MoE block" not in where}, edit.__name__
    assert "1 of 256 values are NaN or infinite" in found["output_norm.weight"]
    assert found.keys() == said(checked(copy, None, text)).keys(), "without the model too"


def test_however_many_numbers_are_compared_at_once(made: Made) -> None:
    """A whole matrix of a real model has hundreds of millions, and every temporary as many again."""
    weight = next(each for each in open_checkpoint(made[0]).weights if each.name == "layers.0.attn_q")
    wrong = load(weight).clone()
    wrong[3, 7] *= 1.5
    wrong[100] *= -1
    for values, vouched, says in (
        (load(weight), False, None),
        (wrong, False, f"{wrong.shape[1] + 1} of {wrong.numel()} values are not the baseline's, at [3, 7] "),
        (-load(weight), True, "holds other numbers than the baseline (cosine -1.000)"),
        (2 * load(weight), True, "numbers are 2 times the baseline's"),
        (wrong.log(), False, f"{int((wrong <= 0).sum())} of {wrong.numel()} values are NaN or infinite"),
    ):
        for piece in (100, 1000, PIECE):
            found = misfit(Plain("w", frozenset(), lambda x=values: x, weight), vouched, piece)
            assert found is None if says is None else str(found).startswith(says), (found, piece)


def test_keys_of_a_file_are_the_model_s(made: Made, text: Path, tmp_path: Path) -> None:
    model, file = made
    for known in (False, True):
        copy = copied(file, tmp_path, known=known)
        with_key(copy, "qwen3moe.rope.freq_base", 5e5)
        with pytest.raises(VerifyError, match=r"another model than .*rope\.freq_base is 500000"):
            checked(copy, model, text)
        copy = copied(file, tmp_path, known=known)
        with_key(copy, "qwen3moe.attention.key_length", 33)
        told = [damage.what for damage in checked(copy, model, text).damages]
        assert "qwen3moe.attention.key_length is 33, the baseline's 32" in told


def test_a_header_of_ours_that_says_something_else(made: Made, text: Path, tmp_path: Path) -> None:
    """Found without the model: a key, a token, and a type of as many bytes."""
    _, file = made
    name = b"blk.1.ffn_up_exps.weight"

    def key(copy: Path) -> None:
        with_key(copy, "qwen3moe.expert_used_count", 1)

    def token(copy: Path) -> None:
        reader = gguf.GGUFReader(copy, "r+")
        field = reader.get_field("tokenizer.ggml.tokens")
        field.parts[field.data[50]][0] ^= 1
        reader.data.flush()

    def type_(copy: Path) -> None:
        data = bytearray(copy.read_bytes())
        at = data.index(name) + len(name) + 4 + 3 * 8
        assert struct.unpack_from("<I", data, at) == (gguf.GGMLQuantizationType.Q4_0,)
        struct.pack_into("<I", data, at, gguf.GGMLQuantizationType.IQ4_NL)
        copy.write_bytes(data)

    assert checked(file, None, text).holds
    for change in (key, token, type_):
        copy = copied(file, tmp_path, known=True)
        change(copy)
        told = said(checked(copy, None, text))
        assert told == {"header": "keys, tokens, types or shapes are not those that were written"}


def test_a_header_whose_names_were_mended_holds(made: Made, text: Path, tmp_path: Path) -> None:
    """As gguf-py's own tool rewrites a file: nothing is computed by a name or a template."""
    _, file = made
    reader = gguf.GGUFReader(file)
    mended, string = tmp_path / "mended.gguf", gguf.GGUFValueType.STRING
    writer = gguf.GGUFWriter(mended, "qwen3moe")
    new = {
        gguf.Keys.General.NAME: MetadataDetails(string, "Another name"),
        gguf.Keys.Tokenizer.CHAT_TEMPLATE: MetadataDetails(string, "{{ messages }}"),
    }
    copy_with_new_metadata(reader, writer, new, [])
    assert b"Another name" in mended.read_bytes()
    assert checked(mended, None, text).holds


def stored(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"format": "pt"})


def config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(raw | changes))


def test_numbers_of_a_folder_are_the_model_s(tiny, text: Path, tmp_path: Path) -> None:
    model, out = tiny("qwen3_moe", **SIZES), tmp_path / "out"
    released.release(model, out, released.gptq(4, 64), GPTQ)

    def head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def norm(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"][7] = float("nan")

    assert checked(out, model, text).holds
    stored(out, head)
    (what,) = said(checked(out, model, text)).values()
    assert "values are not the baseline's, at [" in what
    assert any(note.startswith("AWQ, SmoothQuant and rotations") for note in checked(out, model, text).notes)
    stored(out, norm)
    for base in (None, model):
        assert "NaN or infinite" in said(checked(out, base, text))["layers.1.attn_norm"]


def test_a_config_that_computes_something_else(tiny, text: Path, tmp_path: Path) -> None:
    """Of a folder by anybody, against the model; of ours also without it. One that says of codes that they
    are weights never holds."""
    model, theirs, ours = tiny("qwen3_moe", **SIZES), tmp_path / "theirs", tmp_path / "ours"
    released.release(model, theirs, released.channels, {"quant_method": "fbgemm_fp8"})
    quantized(model, ours, bits=4, group_size=64)
    for folder in (theirs, ours):
        config(folder, norm_topk_prob=False)
        told = [damage.what for damage in checked(folder, model, text).damages]
        assert "norm_topk_prob is False, the baseline's True" in told
    assert [damage.what for damage in checked(ours, None, text).damages] == [
        "norm_topk_prob is False, was written as True"
    ]
    config(theirs, norm_topk_prob=True, tie_word_embeddings=True)
    assert said(checked(theirs, model, text)) == {
        "config.json": "tie_word_embeddings is True, the baseline's False"
    }
    config(theirs, quantization_config={"quant_method": "compressed-tensors"})
    assert "has no config_groups" in said(checked(theirs, None, text))["config.json"]
    config(theirs, quantization_config={})
    what = "has no quantization_config: readers take codes for weights"
    assert said(checked(theirs, None, text)) == {"config.json": what}


def test_tensors_of_ours_under_another_type(tiny, text: Path, tmp_path: Path) -> None:
    """Bytes and checksums are the same, numbers are not."""
    model, out = tiny("qwen3_moe", **SIZES), tmp_path / "out"
    quantized(model, out, bits=4, group_size=64)
    file = out / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = "model.layers.0.mlp.experts.3.up_proj.weight_scale"
    assert header[name]["dtype"] == "BF16"
    header[name]["dtype"] = "F16"
    again = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(data[:8] + again + data[8 + length :])
    assert said(checked(out, None, text))[name] == "is said to be F16 [256, 4], was written as BF16 [256, 4]"


@pytest.mark.parametrize(
    "damage", [{"crc32": [1]}, {"crc32": None}, {"crc32": {}}, {"tensors": 3}, {"config": "x"}]
)
def test_a_record_that_is_none_is_one_line(tiny, text: Path, tmp_path: Path, damage: Any) -> None:
    model, out = tiny("qwen3_moe", **SIZES), tmp_path / "out"
    quantized(model, out, bits=4, group_size=64)
    config(out, "moequant.json", **damage)
    with pytest.raises(VerifyError, match=r"moequant\.json: has no checksums of tensors"):
        checked(out, None, text)
    (out / "moequant.json").write_text("[" * 100_000)
    with pytest.raises(VerifyError, match=r"moequant\.json: cannot be read as JSON"):
        checked(out, None, text)


def test_an_index_that_lies(tiny, text: Path, tmp_path: Path) -> None:
    """Of a tensor that lies in another shard, or that readers who go by the index would leave out."""
    model, out = tiny("qwen3_moe", **SIZES), tmp_path / "out"
    released.release(model, out, released.gptq(4, 64), GPTQ)
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["a.safetensors", "b.safetensors"]
    where = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if where[name] == file}, out / file)
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert checked(out, None, text).holds
    index.write_text(json.dumps({"weight_map": where | {names[0]: files[1]}}))
    with pytest.raises(MoequantError, match=f"{names[0]} is in the index but not in b.safetensors"):
        checked(out, None, text)
    index.write_text(json.dumps({"weight_map": {name: where[name] for name in names[1:]}}))
    assert "is not in model.safetensors.index.json" in said(checked(out, None, text))[names[0]]


def test_experts_in_a_space_of_their_own_are_not_run_as_a_block(tiny, text: Path, tmp_path: Path) -> None:
    """They are fed fewer columns than the module that they lie in."""
    model, out = tiny("nemotron_h_latent"), tmp_path / "out.gguf"
    convert(model, out, Settings(type="Q8_0", calib=text, calib_tokens=1024, eval_tokens=0, effort="fast"))
    report = checked(out, model, text)
    assert report.holds and report.tensors and not report.blocks
    assert any("blocks were not run" in note for note in report.notes)
