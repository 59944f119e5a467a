"""Reading model folders: the right rows in the right place, and one clear line for every way to be broken."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moequant.checkpoint import folder_of, load, open_checkpoint
from moequant.containers.folders.plan import FolderSettings
from moequant.containers.gguf.export import export
from moequant.errors import CheckpointError, FamilyError
from moequant.families import FAMILIES
from moequant.families.config import make_config
from moequant.forward.model import empty_model
from moequant.inspection.folder import inspect_folder
from moequant.report.card import Card
from moequant.report.conversion import Conversion
from moequant.report.summary import How, Report
from moequant.values import Plan, Role, Weight
from moequant.values.ops import apply
from tests import models
from tests.containers.folders.cases import quantized


@pytest.fixture
def broken(tiny, tmp_path: Path) -> Path:
    """A copy of a small Qwen3-MoE folder for a test to damage."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


ANOTHER_CLASS = {
    "dbrx", "gemma4", "glm5_next", "kimi_k25", "llama4", "minimax_m3", "mistral4", "qwen3_vl_moe", "step3p7",
}  # fmt: skip
"""Families whose folders load as another class than the one streamed, with other names of parameters."""

CUT_OTHERWISE = {
    "bailing_hybrid", "ernie4_5_moe", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "nemotron_h",
    "nemotron_h_latent", "qwen3_5_moe", "qwen3_next", "qwen4_exp",
}  # fmt: skip
"""Families cut in more ways than `in_transformers` does by hand. tests/families compare the logits of all."""

ONE_CLASS = [family for family in models.CONFIGS if family not in ANOTHER_CLASS]


def in_transformers(family: str, weight: Weight, whole: Tensor) -> Tensor:
    """What transformers has for a weight in the parameter `whole`, cut here by hand."""
    kind = weight.name.partition(".experts.")[2].split(".")
    if family == "gpt_oss" and kind[0]:  # gate and up alternate; matrices lie transposed
        at = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[kind[0]]
        return whole[..., at] if kind[1:] == ["bias"] else whole.mT[..., at, :]
    if weight.role is Role.OUT_A:  # a matrix for each group of heads
        return whole.unflatten(0, (weight.matrices, -1))
    if kind[0] in ("gate", "up"):
        return whole.chunk(2, 1)[kind[0] == "up"]
    return whole


@pytest.fixture(scope="module")
def held(tiny):
    """`held("mixtral")`: every parameter and buffer of the model that transformers reads from the folder."""
    found: dict[str, dict[str, Tensor]] = {}

    def get(family: str) -> dict[str, Tensor]:
        if family not in found:
            model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.bfloat16)
            found[family] = dict([*model.named_parameters(), *model.named_buffers()])
        return found[family]

    return get


@pytest.mark.parametrize("family", [family for family in ONE_CLASS if family not in CUT_OTHERWISE])
def test_every_weight_equals_the_transformers_parameter(tiny, held, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    for weight in checkpoint.weights:
        whole, values = held(family)[weight.place.param], load(weight)
        kind = torch.int32 if weight.role is Role.TABLE else torch.bfloat16
        assert values.shape == weight.shape and values.dtype == kind
        expected = in_transformers(family, weight, whole).to(values.dtype)
        assert torch.equal(values, expected), weight.name
        assert torch.equal(apply(weight.place.ops, whole).to(values.dtype), expected), weight.name


@pytest.mark.parametrize("family", ONE_CLASS)
def test_what_a_container_cuts_is_the_same_from_the_files_and_from_the_model(tiny, held, family) -> None:
    exported = export(open_checkpoint(tiny(family)))
    for weight in exported.weights:
        whole, values = held(family)[weight.place.param], load(weight)
        assert values.shape == weight.shape and values.is_contiguous()
        assert torch.equal(apply(weight.place.ops, whole).to(values.dtype), values), weight.name
    some = range(1, 3)
    stacks = [weight for weight in exported.weights if weight.is_expert]
    assert all(torch.equal(load(each.of(some)), load(each)[1:3]) for each in stacks)
    for each in exported.weights:  # two experts at a time, and other weights as a whole
        parts = list(each.some(2 * each.numel // each.matrices))
        assert len(parts) == (-(-each.matrices // 2) if each.is_expert else 1)
        assert all(torch.equal(load(part), load(each)[at]) for at, part in parts)


def test_rows_of_q_and_k_are_rotary_pairs_in_the_file(tiny) -> None:
    """llama.cpp rotates rows 0 and 1, 2 and 3, … of a head; transformers rows 0 and d/2, 1 and d/2 + 1, …"""
    checkpoint = open_checkpoint(tiny("mixtral"))
    theirs = {weight.name: weight for weight in checkpoint.weights}
    ours = {weight.name: weight for weight in export(checkpoint).weights}
    for name, heads in (("layers.0.attn_q", 4), ("layers.1.attn_k", 2)):
        for before, after in zip(load(theirs[name]).chunk(heads), load(ours[name]).chunk(heads), strict=True):
            assert torch.equal(after[0::2], before[:32]) and torch.equal(after[1::2], before[32:])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_fused_and_per_expert_checkpoints_read_the_same(tiny, family: str) -> None:
    apart = open_checkpoint(tiny(family))
    fused = open_checkpoint(tiny(family, save={"save_original_format": False}))
    assert any(len(weight.origin.stored) == 1 and weight.role is Role.GATE for weight in fused.weights)
    assert [weight.name for weight in apart.weights] == [weight.name for weight in fused.weights]
    for one, other in zip(apart.weights, fused.weights, strict=True):
        assert one.place == other.place and one.names == other.names
        assert torch.equal(load(one), load(other))


def test_many_shards_read_like_one(tiny) -> None:
    whole = open_checkpoint(tiny("qwen3_moe"))
    sharded = open_checkpoint(tiny("qwen3_moe", save={"max_shard_size": "300KB"}))
    stored = [each for weight in sharded.weights for each in weight.origin.stored]
    assert len({ref.file for each in stored for ref in each.parts.values()}) > 3
    for one, other in zip(whole.weights, sharded.weights, strict=True):
        assert torch.equal(load(one), load(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_source_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(models.build(tmp_path, "olmoe", dtype=dtype))
    assert {load(weight).dtype for weight in checkpoint.weights} == {dtype}


def test_tied_embeddings_feed_the_head(tiny) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", tie_word_embeddings=True))
    names = {weight.name: weight for weight in checkpoint.weights}
    assert checkpoint.tied and "head" not in names
    site = names["embedding"].site
    assert site is not None and (site.name, site.module, site.side) == ("head.input", "model.norm", "output")


def fails(folder: Path, *parts: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        checkpoint = open_checkpoint(folder)
        for weight in checkpoint.weights:
            load(weight)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert re.search(part, message), message


def test_a_missing_folder_and_a_folder_without_a_model(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "no such file or folder")
    fails(tmp_path, "config.json")


def test_a_missing_shard_is_named(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe", save={"max_shard_size": "300KB"}), tmp_path / "m"))
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    fails(folder, re.escape(gone.name), "missing")


def test_a_truncated_shard_is_named(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails(broken, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "junk", [b"", b"short", b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json............."]
)
def test_a_damaged_header_is_an_error(broken: Path, junk: bytes) -> None:
    (broken / "model.safetensors").write_bytes(junk)
    fails(broken, "model.safetensors")


def test_broken_json_is_an_error(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    fails(broken, "config.json", "JSON")


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_experts_are_listed(broken: Path) -> None:
    rewrite(broken, lambda t: [t.pop(f"model.layers.1.mlp.experts.{e}.up_proj.weight") for e in (2, 5)])
    fails(broken, r"layer 1 up", r"\[2, 5\] of 8")


def test_a_missing_tensor_is_named(broken: Path) -> None:
    rewrite(broken, lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"))
    fails(broken, "layer 0", "k_proj")


def test_an_unknown_tensor_is_never_dropped(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({"model.layers.0.mlp.surprise.weight": torch.ones(2, 2)}))
    fails(broken, "surprise", kind=FamilyError)


def test_an_unknown_dtype_is_named(broken: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(broken, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    fails(broken, "q_proj", "F8_E4M3")


def test_fused_experts_must_match_the_config(tiny, tmp_path: Path) -> None:
    fused = tiny("qwen3_moe", save={"save_original_format": False})
    folder = Path(shutil.copytree(fused, tmp_path / "fused"))
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(folder, lambda t: t.update({name: t[name][:7].clone()}))
    fails(folder, "layer 0 down", r"\[7, 256, 256\]", "8 experts")


@pytest.mark.parametrize("fused", [False, True])
def test_a_single_expert_is_still_a_stack(tmp_path: Path, fused: bool) -> None:
    save = {"save_original_format": not fused}
    checkpoint = open_checkpoint(
        models.build(tmp_path, "mixtral", num_local_experts=1, num_experts_per_tok=1, save=save)
    )
    for weight in checkpoint.weights:
        if weight.is_expert:
            shape = (1, 256, 512) if weight.role is Role.DOWN else (1, 512, 256)
            assert load(weight).shape == weight.shape == shape


def test_experts_of_different_shapes_are_refused(broken: Path) -> None:
    rewrite(
        broken, lambda t: t.update({"model.layers.0.mlp.experts.3.down_proj.weight": torch.ones(256, 128)})
    )
    fails(broken, "layer 0 down", r"\[256, 128\], expert 0 is \[256, 256\]; .* Download them again")


def test_experts_of_different_types_are_refused(broken: Path) -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    rewrite(broken, lambda t: t.update({name: t[name].float()}))
    fails(broken, r"experts\.3\.down_proj\.weight is stored as F32, expert 0 as BF16; save all in one type")


def test_a_vocabulary_that_disagrees_is_refused(broken: Path) -> None:
    models.edit_config(broken, vocab_size=999)
    fails(broken, "embedding", "999")


def test_a_checkpoint_of_an_unknown_method_is_refused(broken: Path) -> None:
    models.edit_config(broken, quantization_config={"quant_method": "strange"})
    fails(broken, "quant_method is strange", "give the unquantized checkpoint")


def test_a_tensor_in_two_shards_is_refused(broken: Path) -> None:
    shutil.copy(broken / "model.safetensors", broken / "other.safetensors")
    (broken / "model.safetensors").rename(broken / "another.safetensors")
    fails(broken, "two shards")


@pytest.mark.parametrize("indexed", [False, True])
def test_of_several_files_those_are_read_that_transformers_reads(broken: Path, indexed: bool) -> None:
    """The one that has all of it, whatever an index beside it says: saved later, or Mistral's own names."""
    other = {name: each + 1 for name, each in load_file(broken / "model.safetensors").items()}
    save_file(other, broken / "other.safetensors", {"format": "pt"})
    if indexed:
        index = {"weight_map": dict.fromkeys(other, "other.safetensors")}
        (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(broken)
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.bfloat16)
    assert torch.equal(load(checkpoint.weights[-1]), model.get_output_embeddings().weight)
    assert checkpoint.notes == ("not read, as in transformers: other.safetensors",)
    assert inspect_folder(folder_of(broken)).notes[-1:] == checkpoint.notes


def test_the_index_must_match_the_shards(broken: Path) -> None:
    index = {"weight_map": {"ghost.weight": "model.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(broken, "ghost.weight", "index")


def test_a_head_that_differs_from_the_embedding_is_kept(broken: Path) -> None:
    """As transformers does, whatever tie_word_embeddings says; an equal one is the embedding."""
    models.edit_config(broken, tie_word_embeddings=True)
    checkpoint = open_checkpoint(broken)
    head = checkpoint.weights[-1]
    assert not checkpoint.tied and head.name == "head"
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.bfloat16)
    assert torch.equal(load(head), model.get_output_embeddings().weight)
    rewrite(broken, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_checkpoint(broken).tied


def test_a_tied_pair_may_be_stored_under_the_name_of_the_head(broken: Path) -> None:
    models.edit_config(broken, tie_word_embeddings=True)
    rewrite(broken, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    checkpoint = open_checkpoint(broken)
    (embedding,) = [weight for weight in checkpoint.weights if weight.role is Role.EMBEDDING]
    assert checkpoint.tied and embedding.origin.stored[0].name == "lm_head.weight"
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.bfloat16)
    assert torch.equal(load(embedding), model.get_input_embeddings().weight)


def test_a_missing_head_is_named_unless_the_config_ties_it(broken: Path) -> None:
    rewrite(broken, lambda t: t.pop("lm_head.weight"))
    fails(broken, r"lm_head\.weight is missing", "tie_word_embeddings")


@pytest.mark.parametrize("name", ["k_proj", "down_proj"])
def test_a_vector_where_a_matrix_belongs_is_one_line(broken: Path, name: str) -> None:
    def flatten(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if f"layers.0.{'self_attn' if name[0] == 'k' else 'mlp'}" in key]:
            if key.endswith(f"{name}.weight"):
                tensors[key] = tensors[key].flatten()

    rewrite(broken, flatten)
    with pytest.raises(CheckpointError) as caught:
        empty_model(open_checkpoint(broken))
    assert "\n" not in str(caught.value) and "layers.0" in str(caught.value)


def test_heads_that_do_not_fit_the_projections_are_named(broken: Path) -> None:
    models.edit_config(broken, num_attention_heads=6)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn_q: shape \[128, 256\].*\[192, 256\]"):
        empty_model(open_checkpoint(broken))


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"]
)
def test_a_size_that_no_model_has_is_named_before_anything_is_made_of_it(broken: Path, key: str) -> None:
    models.edit_config(broken, **{key: 10**9})
    with pytest.raises(FamilyError, match=f"config key {key} = 1000000000: more than any model has"):
        open_checkpoint(broken)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gpt_oss", "num_local_experts"),
        ("mixtral", "num_experts_per_tok"),
        ("deepseek_v3", "n_routed_experts"),
        ("ernie4_5_moe", "moe_num_experts"),
    ],
)
def test_more_experts_than_any_model_has(family: str, key: str) -> None:
    """Their names would take seconds, and those of a layer are listed before any is looked for."""
    described = next(each for each in FAMILIES if each.name == family)
    raw = {"architectures": list(described.classes), "model_type": described.model_type, key: 20_000}
    with pytest.raises(FamilyError, match=f"config key {key} = 20000: more than any model has"):
        make_config(described, raw)


@pytest.mark.parametrize("used", [0, 9])
def test_a_token_is_sent_to_as_many_experts_as_there_are(broken: Path, used: int) -> None:
    models.edit_config(broken, num_experts_per_tok=used)
    fails(broken, f"num_experts_per_tok is {used}", "8 experts")


def test_the_name_of_a_model_in_the_cache_is_its_repositorys(tiny, tmp_path: Path) -> None:
    """Files of a snapshot are links into a folder of blobs, and the snapshot is called by its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--acme--Tiny-MoE" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in tiny("qwen3_moe").iterdir():
        (snapshot / file.name).symlink_to(file)
    found, plain = open_checkpoint(snapshot), open_checkpoint(tiny("qwen3_moe"))
    assert (found.name, found.repository) == ("Tiny-MoE", "acme/Tiny-MoE")
    assert plain.name == plain.repository == tiny("qwen3_moe").name
    how = How(folder=FolderSettings())
    report = Report(snapshot, tmp_path / "out", 1, found, Plan("INT4", (), 0), how=how)
    card = Card(Conversion((report,))).text()
    assert "base_model: acme/Tiny-MoE\n" in card.replace('"', "") and "# Tiny-MoE, INT4" in card
    assert commit not in card


NAME = "model.layers.0.mlp.experts.3.down_proj.weight"

HEADERS = {
    "shifted into a neighbour": lambda e: {"data_offsets": [n - 64 for n in e["data_offsets"]]},
    "shorter than its shape": lambda e: {"data_offsets": [e["data_offsets"][0], e["data_offsets"][0] + 16]},
    "of another type": lambda e: {"dtype": "F32"},
    "of a negative size": lambda e: {"shape": [-256, -256]},
    "without offsets": lambda e: {"data_offsets": None},
    "of an unknown type": lambda e: {"dtype": "Q4"},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_breaks_a_rule_of_the_format_is_named(broken: Path, what: str) -> None:
    """What the safetensors library refuses is refused here, and no byte is read from a wrong place."""
    file = broken / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[NAME] |= HEADERS[what](header[NAME])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    fails(broken, r"model\.safetensors: tensor ")


def test_experts_under_the_names_of_llm_compressor(tiny, tmp_path: Path) -> None:
    """It calls Mixtral's w1, w3 and w2 as other families do."""
    model = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))
    told = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    stored = {
        re.sub(r"\bw[123]\b", lambda found: told[found[0]], name): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    assert not any(".w1." in name for name in stored)
    for one, two in zip(
        open_checkpoint(tiny("mixtral")).weights, open_checkpoint(model).weights, strict=True
    ):
        assert one.names == two.names and torch.equal(load(one), load(two))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_how_old_tools_say_that_they_quantized(tiny, tmp_path: Path, name: str) -> None:
    """Beside a config.json that does not."""
    folder = tmp_path / "model"
    quantized(tiny("qwen3_moe", moe_intermediate_size=128), folder, scheme="W4A16", layout="gptq")
    told = open_checkpoint(folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    beside = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").unlink()
    beside.pop("quant_method", None)
    (folder / name).write_text(json.dumps(beside))
    found = open_checkpoint(folder)
    for one, two in zip(found.weights, told.weights, strict=True):
        assert torch.equal(load(one), load(two))
