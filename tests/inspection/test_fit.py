"""`fit` beside llama.cpp's own memory report, and its placements beside brute force."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moequant.cli import app
from moequant.cli.fit import memory
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.header import Header, TensorInfo
from moequant.containers.gguf.read import read_header
from moequant.errors import CheckpointError, PlanError
from moequant.inspection.fit import RESERVE, Candidate, Hardware, fit, place
from moequant.runtimes.llama_cpp.binding import LlamaError
from moequant.runtimes.llama_cpp.kv_cache import Load, compute_bytes, kv_bytes
from tests import gguf_shapes
from tests.clients.llama import memory_report, model_bytes
from tests.clients.server import options
from tests.evaluate import released

GIB = 2**30
PRINTED = 5300
"""llama.cpp prints hundredths of a MiB: half of one, in bytes."""

GGML_TYPES = {"f16": 1, "q8_0": 8}


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory: pytest.TempPathFactory):
    """`file("mixtral")`, or of a folder: its F16 GGUF, which needs no calibration."""
    made: dict[str, Path] = {}

    def get(model: str | Path) -> Path:
        key = str(model)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("fit") / "model.gguf"
            convert(
                tiny(model) if isinstance(model, str) else model, made[key], Settings("F16", eval_tokens=0)
            )
        return made[key]

    return get


def close_to_llama_cpp(path: Path, load: Load, slack: float, lines: int = 2) -> None:
    """KV cache and state as so many lines print them; the compute buffer llama.cpp's, or `slack` more."""
    header = read_header(path)
    theirs = memory_report(path, load.ctx * load.parallel, load.parallel, GGML_TYPES[load.cache_type])
    assert abs(sum(kv_bytes(header, load)) - theirs.kv - theirs.state) <= lines * PRINTED
    ours = compute_bytes(header, load)
    assert theirs.compute - PRINTED <= ours <= theirs.compute * (1 + slack) + PRINTED, ours / theirs.compute


@pytest.mark.parametrize("load", [Load(512), Load(1000, 3), Load(1024, 2, "q8_0")], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "llama", "qwen3"])
def test_memory_of_tiny_models_is_what_llama_cpp_reserves(file, family: str, load: Load) -> None:
    close_to_llama_cpp(file(family), load, slack=0.35 if family in ("llama", "qwen3") else 0.12)


@pytest.mark.parametrize("load", [Load(512), Load(1000, 3), Load(4096)], ids=str)
def test_memory_of_delta_attention_among_latent_is_what_llama_cpp_reserves(file, load: Load) -> None:
    close_to_llama_cpp(file("bailing_hybrid"), load, slack=0.12)


@pytest.mark.parametrize("load", [Load(512), Load(1000, 3), Load(16384), Load(1024, 2, "q8_0")], ids=str)
def test_memory_of_compressed_attention_is_what_llama_cpp_reserves(file, load: Load) -> None:
    close_to_llama_cpp(file("deepseek_v4"), load, slack=0.3, lines=8)


COMPRESSED = {
    "Flash": {
        "layers": 43,
        "hidden": 4096,
        "heads": 64,
        "rank": 1024,
        "experts": 256,
        "ff": 2048,
        "top_k": 512,
    },
    "Pro": {
        "layers": 61,
        "hidden": 7168,
        "heads": 128,
        "rank": 1536,
        "experts": 384,
        "ff": 3072,
        "top_k": 1024,
    },
}
"""Shapes of DeepSeek-V4."""


@pytest.mark.parametrize("name", COMPRESSED)
def test_memory_of_deepseek_v4_is_what_llama_cpp_reserves(tmp_path: Path, name: str) -> None:
    path = gguf_shapes.compressed(tmp_path / "shape.gguf", **COMPRESSED[name])
    for load in (Load(4096), Load(8192, 4), Load(16384, 1, "q8_0"), Load(131072, 2), Load(1048576)):
        close_to_llama_cpp(path, load, slack=0.26, lines=8)


@pytest.mark.parametrize("load", [Load(512), Load(1000, 3), Load(512, 2, "q8_0")], ids=str)
@pytest.mark.parametrize(
    "family", ["deepseek_v32", "glm_moe_dsa", "hy_v4", "glm5_next", "minimax_m3", "qwen4_exp"]
)
def test_caches_of_indexers_are_what_llama_cpp_reserves(file, family: str, load: Load) -> None:
    """Of all layers, of some, of pools of tokens, with values, and beside a table's convolution."""
    path, kind = file(family), GGML_TYPES[load.cache_type]
    if load.cache_type == "q8_0" and family not in ("glm5_next", "qwen4_exp"):  # rows of 80 and of 48
        with pytest.raises(LlamaError, match="block size 32 does not divide"):
            memory_report(path, load.ctx * load.parallel, load.parallel, kind)
        with pytest.raises(PlanError, match="blocks of 32 do not divide rows of"):
            kv_bytes(read_header(path), load)
        return
    theirs = memory_report(path, load.ctx * load.parallel, load.parallel, kind)
    # Two caches and a state are printed, each to hundredths of a MiB.
    assert abs(sum(kv_bytes(read_header(path), load)) - theirs.kv - theirs.state) <= 4 * PRINTED


INDEXED = {"deepseek_v32": 0.03, "glm_moe_dsa": 0.14, "hy_v4": 0.2, "minimax_m3": 0.3}
"""How much more than llama.cpp reserves is said of batches while an indexer chooses, at most."""


@pytest.mark.parametrize("family", INDEXED)
def test_memory_of_indexers_is_what_llama_cpp_reserves(file, family: str) -> None:
    """Scores and masks grow with the context, four times as fast as a mask alone and more."""
    for load in (Load(512), Load(1000, 3), Load(4096), Load(8192, 3), Load(131072)):
        close_to_llama_cpp(file(family), load, INDEXED[family], lines=4)


def test_memory_of_an_indexer_of_pools_is_what_llama_cpp_reserves(file) -> None:
    """Several sequences are looked through together: at 8 of 8,192 tokens that is most of it."""
    for load in (Load(512), Load(4096), Load(131072), Load(1000, 3), Load(512, 64), Load(8192, 8)):
        close_to_llama_cpp(file("glm5_next"), load, slack=0.52, lines=4)


@pytest.mark.parametrize(
    ("family", "wide"),
    [
        ("jamba", {}),
        ("jamba", {"mamba_d_state": 128}),
        ("granitemoehybrid", {}),
        ("nemotron_h", {"mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8}),
        (
            "qwen3_next",
            {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 8},
        ),
        ("bailing_hybrid", {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 8}),
        ("lfm2_moe", {}),
        ("qwen3_vl_moe", {}),
        ("llama4", {}),
    ],
)
def test_memory_of_states_is_what_llama_cpp_reserves(tiny, file, family: str, wide: dict) -> None:
    """What layers with states work on, and the states of all sequences: most of it with many. Pictures and
    weighted inputs are more hidden states."""
    path = file(tiny(family, **wide))
    for load in (Load(512), Load(1000, 3), Load(4096), Load(512, 8), Load(512, 32)):
        close_to_llama_cpp(path, load, slack=0.35, lines=4)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_memory_of_an_indexer_of_blocks_is_no_more_than_said(file, tiny, tmp_path: Path, size: int) -> None:
    """A bound: twice as much at most, and 2.4 times with blocks of 2. The release's are of 4 tokens."""
    keys = {"attention.compress_ratios": [0, size], "attention.indexer.top_k": 2048}
    path = gguf_shapes.changed(file(tiny("qwen4_exp", ple_layer_ids=[])), tmp_path / "shape.gguf", keys, {})
    for load in (Load(512), Load(4096), Load(8192, 4), Load(131072)):
        close_to_llama_cpp(path, load, slack=1.4 if size == 2 else 1, lines=4)


def test_memory_of_real_indexers_is_what_llama_cpp_reserves(file, tmp_path: Path) -> None:
    """As DeepSeek-V3.2's: 64 heads of 128 numbers, of which 2,048 tokens are chosen; and, as MiniMax M3's,
    one for each of four heads of keys."""
    wide = {"head_count": 64, "key_length": 128, "top_k": 2048}
    shapes = {"attn_q_b": (8192, 96), "attn_k": (128, 256), "k_norm": (128,), "proj": (64, 256)}
    one = gguf_shapes.changed(
        file("deepseek_v32"),
        tmp_path / "one.gguf",
        {f"attention.indexer.{key}": value for key, value in wide.items()},
        {f"indexer.{name}.": shape for name, shape in shapes.items()},
    )
    two = gguf_shapes.changed(
        file("minimax_m3"),
        tmp_path / "two.gguf",
        {"attention.indexer.head_count": 4, "attention.head_count_kv": 4},
        {"attn_k.": (192, 256), "attn_v.": (192, 256), "indexer.q_proj.": (128, 256)},
    )
    for path, slack in ((one, 0.09), (two, 0.21)):
        for load in (Load(512), Load(2048), Load(65536)):
            close_to_llama_cpp(path, load, slack, lines=4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_weights_are_what_llama_cpp_maps(file, family: str) -> None:
    header = read_header(file(family))
    padding = 64 * len(header.tensors)
    assert (
        abs(sum(tensor.bytes for tensor in header.tensors) - model_bytes(file(family))) <= PRINTED + padding
    )


def test_memory_of_a_trained_model(mix: Path, file) -> None:
    path = file(mix)
    for load in (Load(2048), Load(512, 4), Load(2048, 1, "q8_0")):
        close_to_llama_cpp(path, load, slack=0.12)


SHAPES = {
    "Qwen3-30B-A3B": lambda path: gguf_shapes.gqa(
        path, "qwen3moe", layers=48, hidden=2048, heads=32, kv=4, experts=128, used=8, ff=768, vocab=151936
    ),
    "Mixtral-8x7B": lambda path: gguf_shapes.gqa(
        path, "llama", layers=32, hidden=4096, heads=32, kv=8, experts=8, used=2, ff=14336, vocab=32000
    ),
    "DeepSeek-V2-Lite": lambda path: gguf_shapes.mla(path, layers=27),
    "gpt-oss-20b": lambda path: gguf_shapes.windowed(path, layers=24),
}
"""Shapes of real models: grouped queries, latent attention, sliding windows. No weights are behind them."""


@pytest.mark.parametrize("name", SHAPES)
def test_memory_of_real_shapes_is_what_llama_cpp_reserves(tmp_path: Path, name: str) -> None:
    path = SHAPES[name](tmp_path / "shape.gguf")
    for load in (Load(4096), Load(16384), Load(8192, 4), Load(16384, 1, "q8_0")):
        close_to_llama_cpp(path, load, slack=0.05)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SHAPES["Qwen3-30B-A3B"](tmp_path_factory.mktemp("fit") / "qwen.gguf")


@settings(max_examples=40)
@given(vram=st.floats(0, 40), ram=st.floats(0, 40), ctx=st.integers(1, 32768), parallel=st.integers(1, 4))
def test_every_byte_has_one_place(qwen: Path, vram: float, ram: float, ctx: int, parallel: int) -> None:
    header, load = read_header(qwen), Load(ctx, parallel)
    hardware = Hardware(int(vram * GIB), int(ram * GIB))
    placement = place(header, hardware, load)
    held = sum(share.weights + share.experts for share in (placement.gpu, placement.ram))
    assert held == sum(tensor.bytes for tensor in header.tensors)
    assert placement.gpu.kv + placement.ram.kv == sum(kv_bytes(header, load))
    assert placement.gpu.total == 0 or placement.gpu.total + RESERVE <= hardware.vram
    assert placement.lacking == max(placement.ram.total - hardware.ram, 0)
    assert placement.speed_full < placement.speed


@settings(max_examples=40)
@given(vram=st.floats(1, 24))
def test_nothing_more_would_have_fitted(qwen: Path, vram: float) -> None:
    """The experts of one more layer, or else the weights of one more, would not have gone on the GPU."""
    header, load = read_header(qwen), Load(16384)
    hardware = Hardware(int(vram * GIB), 64 * GIB)
    placement = place(header, hardware, load)
    free = hardware.vram - RESERVE - placement.gpu.total
    if placement.gpu_layers > placement.layers and placement.cpu_moe:
        assert free < layer_bytes(header, placement.cpu_moe - 1, experts=True)
    elif 0 < placement.gpu_layers <= placement.layers:
        layer = placement.layers - placement.gpu_layers
        assert free < layer_bytes(header, layer, experts=False) + kv_bytes(header, load)[layer]


def layer_bytes(header: Header, layer: int, experts: bool) -> int:
    return sum(t.bytes for t in header.tensors if t.layer == layer and ("_exps." in t.name) is experts)


def test_speed_is_bytes_over_bandwidth(qwen: Path) -> None:
    """By hand, for everything in system memory and for everything on the GPU."""
    header = read_header(qwen)
    experts = sum(tensor.bytes for tensor in header.tensors if "_exps." in tensor.name)
    rest = sum(tensor.bytes for tensor in header.tensors) - experts
    embedding = next(tensor.bytes for tensor in header.tensors if tensor.name == "token_embd.weight")
    read = rest - embedding + experts * 8 / 128
    slow = place(header, Hardware(0, 64 * GIB, ram_bandwidth=50e9), Load(4096))
    assert slow.speed == pytest.approx(50e9 / read)
    assert slow.speed_full == pytest.approx(50e9 / (read + sum(kv_bytes(header, Load(4096)))))
    fast = place(header, Hardware(48 * GIB, 64 * GIB, vram_bandwidth=1e12), Load(4096))
    assert fast.all_on_gpu and fast.speed == pytest.approx(1e12 / read)
    both = place(header, Hardware(10 * GIB, 64 * GIB), Load(4096))
    assert both.cpu_moe and both.speed == pytest.approx(1 / (both.gpu.read / 900e9 + both.ram.read / 60e9))
    assert both.gpu.read + both.ram.read == pytest.approx(read)


def test_experts_spill_to_a_disk_that_is_offered(qwen: Path) -> None:
    header, load = read_header(qwen), Load(4096)
    refused = place(header, Hardware(4 * GIB, 8 * GIB), load)
    assert not refused.fits
    spilled = place(header, Hardware(4 * GIB, 8 * GIB, disk_bandwidth=2e9), load)
    assert spilled.fits and spilled.disk == refused.lacking and spilled.ram.total == 8 * GIB
    assert spilled.speed < refused.speed


def chosen(path: Path, hardware: Hardware, load: Load) -> Candidate:
    found = fit(path, hardware, load).best
    assert found is not None
    return found


def moved(header: Header, patterns: list[str]) -> int:
    """Bytes of the tensors that the overrides take off the GPU; patterns are searched, not matched."""
    return sum(t.bytes for t in header.tensors if any(re.search(pattern, t.name) for pattern in patterns))


def patterns(overrides: str) -> list[str]:
    return [entry.removesuffix("=CPU") for entry in overrides.split(",")] if overrides else []


@pytest.mark.parametrize("vram", [0, 1.9, 3.2, 12, 48])
def test_llama_server_reads_the_command_as_it_is_meant(qwen: Path, vram: float) -> None:
    """Through llama.cpp's own parser: nothing, part of the layers, experts of some layers, all on the GPU."""
    load, header = Load(8192, 2, "q8_0"), read_header(qwen)
    candidate = chosen(qwen, hardware(vram), load)
    placement, read = candidate.placement, options(candidate.command)
    assert read["model"] == str(qwen) and read["ctx"] == 16384 and read["parallel"] == 2
    assert read["flash"] == 1 and read["cache_k"] == read["cache_v"] == GGML_TYPES["q8_0"]
    assert min(read["gpu_layers"], 49) == placement.gpu_layers
    if placement.gpu_layers:
        assert moved(header, patterns(read["overrides"])) == placement.ram.experts
    else:
        assert not read["overrides"] and placement.ram.experts == moved(header, ["_exps"])


def test_the_regimes_are_the_ones_meant(qwen: Path) -> None:
    """The sizes of the test above: 0, some and all layers; all, some and no experts in system memory."""
    found = [chosen(qwen, hardware(v), Load(8192, 2, "q8_0")).placement for v in (0, 1.9, 3.2, 12, 48)]
    assert [p.gpu_layers for p in found][::4] == [0, 49] and 0 < found[1].gpu_layers < 49
    assert found[2].gpu_layers == found[3].gpu_layers == 49
    assert found[2].cpu_moe > found[3].cpu_moe > 0 == found[4].cpu_moe


def hardware(vram: float) -> Hardware:
    return Hardware(int(vram * GIB), 64 * GIB)


def test_the_override_moves_the_same_experts(qwen: Path) -> None:
    candidate = chosen(qwen, hardware(12), Load(8192))
    assert candidate.override is not None
    read = options(f"llama-server -m {qwen} -ngl 99 -ot {shlex.quote(candidate.override)}")
    (pattern,) = patterns(read["overrides"])
    assert 10 < candidate.placement.cpu_moe < 48
    assert moved(read_header(qwen), [pattern]) == candidate.placement.ram.experts
    with pytest.raises(RuntimeError, match="refuses"):
        options("llama-server --no-such-option")


def test_leading_dense_layers_count_but_free_nothing(tmp_path: Path) -> None:
    """The first block of DeepSeek has no experts: `--n-cpu-moe 1` would be the same as none."""
    header = read_header(SHAPES["DeepSeek-V2-Lite"](tmp_path / "d.gguf"))
    counts = {place(header, hardware(vram / 10), Load(4096)).cpu_moe for vram in range(20, 160)}
    assert 0 in counts and 2 in counts and 1 not in counts


def test_a_tied_embedding_is_on_both_sides(qwen: Path) -> None:
    whole = read_header(qwen)
    tied = Header(
        whole.path,
        whole.metadata,
        tuple(t for t in whole.tensors if t.name != "output.weight"),
        whole.file_bytes,
    )
    embedding = next(t.bytes for t in tied.tensors if t.name == "token_embd.weight")
    placed = place(tied, hardware(48), Load(4096))
    assert placed.ram.weights == embedding
    assert placed.gpu.weights + placed.gpu.experts == sum(t.bytes for t in tied.tensors)


def test_a_folder_is_answered_with_its_best_type(tiny) -> None:
    folder = tiny("qwen3_moe")
    everything = fit(folder, Hardware(0, GIB), Load(256))
    names = [candidate.name for candidate in everything.candidates]
    assert everything.best is not None and everything.best.name == names[0] == "BF16"
    sizes = [candidate.file_bytes for candidate in everything.candidates]
    assert sizes == sorted(sizes, reverse=True)
    third = everything.candidates[2]
    tight = fit(folder, Hardware(0, third.placement.ram.total), Load(256))
    assert tight.best is not None and tight.best.name == third.name
    assert not any(candidate.placement.fits for candidate in tight.candidates[:2])
    quick = fit(folder, Hardware(0, GIB), Load(256), min_speed=third.placement.speed)
    assert quick.best is not None and quick.best.placement.speed >= third.placement.speed
    assert quick.best.file_bytes <= third.file_bytes
    on_gpu = fit(folder, Hardware(8 * GIB, GIB), Load(256))
    assert on_gpu.fastest is on_gpu.best


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(("form", "config"), [(released.gptq(4, 64), GPTQ), (released.blocks, FP8)])
def test_floats_are_no_answer_for_a_quantized_folder(tiny, tmp_path: Path, form, config) -> None:
    """They would hold the same numbers in many times the bytes."""
    out = tmp_path / "out"
    released.release(tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=256), out, form, config)
    found = fit(out, Hardware(0, GIB), Load(256))
    assert found.best is not None and found.best.name == "Q8_0"
    assert not {"F32", "BF16", "F16"} & {candidate.name for candidate in found.candidates}


def test_a_short_context_is_taken_whole(tiny) -> None:
    """The usual 8,192 tokens are more than some models have."""
    short = fit(tiny("mixtral", max_position_embeddings=2048), Hardware(0, GIB), Load())
    assert short.load.ctx == 2048 and "-c 2048" in short.candidates[0].command
    assert fit(tiny("mixtral", max_position_embeddings=16384), Hardware(0, GIB), Load()).load.ctx == 8192


def test_what_cannot_be_known_is_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--ctx 40,000 is more than the model's context; give --ctx 32768"):
        fit(qwen, hardware(24), Load(40_000))
    whole = read_header(qwen)
    metadata = {key.replace("qwen3moe", "kimi-k3"): value for key, value in whole.metadata.items()}
    metadata["general.architecture"] = "kimi-k3"
    strange = Header(whole.path, metadata, whole.tensors, whole.file_bytes)
    with pytest.raises(PlanError, match="llama-fit-params"):
        place(strange, hardware(24), Load(4096))
    with pytest.raises(CheckpointError, match="no such file"):
        fit(tmp_path / "absent.gguf", hardware(24), Load(4096))
    gguf_shapes.write(tmp_path / "mmproj.gguf", "clip", {}, {"v.patch_embd.weight": (64, 256)})
    with pytest.raises(CheckpointError, match=r"mmproj\.gguf: no layers"):
        fit(tmp_path / "mmproj.gguf", hardware(24), Load(4096))


def test_state_space_layers_have_state_and_no_cache() -> None:
    """Qwen3-Next: three of four layers keep 32 heads of 128 x 128 and a convolution of 3 tokens, f32."""
    keys = {
        "block_count": 4, "embedding_length": 2048, "attention.head_count": 16, "attention.head_count_kv": 2,
        "attention.key_length": 256, "attention.value_length": 256, "ssm.conv_kernel": 4,
        "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.group_count": 16,
    }  # fmt: skip
    metadata = {"general.architecture": "qwen3next"} | {f"qwen3next.{k}": v for k, v in keys.items()}
    names = [f"blk.{i}.{'attn_k' if i == 3 else 'ssm_conv1d'}.weight" for i in range(4)]
    header = Header(Path("q"), metadata, tuple(TensorInfo(name, "F32", (1,), 4) for name in names), 0)
    state = 4 * (3 * (4096 + 2 * 16 * 128) + 4096 * 128)
    assert kv_bytes(header, Load(1000, 2)) == (2 * state,) * 3 + (2 * 1024 * 2 * 2 * 256 * 2,)


@pytest.mark.parametrize("ratios", [{}, {"attention.compress_ratios": (0, 0)}])
def test_a_header_that_lacks_keys_of_its_indexer_and_table(ratios: dict[str, object]) -> None:
    keys = {
        "block_count": 2, "embedding_length": 2048, "attention.head_count": 16, "attention.head_count_kv": 2,
        "attention.key_length": 256, "attention.value_length": 256, "ssm.conv_kernel": 4,
        "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.group_count": 16,
        "attention.indexer.key_length": 128, "attention.indexer.head_count": 4,
        "attention.indexer.top_k": 512, "ple.layers": (0,), "ple.ngram_size": 3, "hyper_connection.count": 4,
    } | ratios  # fmt: skip
    metadata = {"general.architecture": "qwen4exp"} | {f"qwen4exp.{k}": v for k, v in keys.items()}
    names = ("blk.0.ssm_conv1d.weight", "blk.1.attn_k.weight")
    header = Header(Path("q"), metadata, tuple(TensorInfo(name, "F32", (1,), 4) for name in names), 0)
    assert kv_bytes(header, Load(1000))[0] == 4 * (3 * (4096 + 2 * 16 * 128) + 4096 * 128)
    assert compute_bytes(header, Load(1000)) > 1024 * 512 * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24G", 24 * 10**9),
        ("24GiB", 24 * GIB),
        ("0", 0),
        ("1.5GiB", 3 * GIB // 2),
        ("512m", 512 * 10**6),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert memory(text) == expected


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command(tiny, qwen: Path) -> None:
    code, shown, _ = run("fit", qwen, "--vram", "12GiB", "--ram", "64GiB", "--ctx", 8192)
    best = chosen(qwen, hardware(12), Load(8192))
    assert code == 0 and f"\n  {best.command}\n" in shown and f"-ot '{best.override}'\n" in shown
    code, plain, _ = run("fit", qwen, "--vram", "12GiB", "--ram", "64GiB", "--ctx", 8192, "--json")
    found = json.loads(plain)
    assert found["candidates"][0]["command"] == best.command and found["best"] == "qwen.gguf"
    assert found["nothing_fits"] is None
    code, shown, _ = run("fit", tiny("olmoe"), "--vram", 0, "--ram", "1G", "--ctx", 256)
    assert code == 0 and "moequant convert" in shown and "--type BF16" in shown


def test_when_nothing_fits_the_smallest_is_named_once(tiny, qwen: Path) -> None:
    """It is the answer: on stdout, as the rest of it, and with an exit code for scripts."""
    code, shown, says = run("fit", tiny("mixtral"), "--vram", 0, "--ram", "1MiB", "--ctx", 256)
    smallest = fit(tiny("mixtral"), Hardware(0, 2**20), Load(256)).candidates[-1].name
    assert code == 1 and says == "" and "MiB too much" in shown
    assert shown.count("nothing fits") == 1 and f"nothing fits: the smallest, {smallest} " in shown
    small = ("fit", qwen, "--vram", "4G", "--ram", "4G")
    code, shown, says = run(*small)
    assert code == 1 and says == "" and "GiB more system memory" in shown
    code, shown, says = run(*small, "--json")
    found = json.loads(shown)
    assert code == 1 and says == "" and found["best"] is None and "more system" in found["nothing_fits"]
    code, shown, _ = run("fit", qwen, "--vram", "24G", "--ram", "64G", "--min-speed", 100_000)
    assert code == 1 and "as fast as --min-speed asks for" in shown
    code, _, says = run("fit", qwen, "--vram", "many", "--ram", "64G")
    assert code == 2 and "such as 14G" in says


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bandwidth_is_a_positive_number(bandwidth: float) -> None:
    with pytest.raises(PlanError, match=r"--ram-bandwidth .*GB/s above 0"):
        Hardware(1 << 30, 1 << 30, ram_bandwidth=bandwidth)
