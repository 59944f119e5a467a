"""The ctypes client agrees with transformers on a model written tensor by tensor, and says why it fails."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.clients.llama import Llama, LlamaError

VOCAB, WIDTH, POSITIONS = 48, 32, 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def path(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("A") + i) for i in range(VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(VOCAB - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp turns neighbours where transformers turns halves.
            values = values.reshape(2, WIDTH // 2, WIDTH).swapaxes(0, 1).reshape(WIDTH, WIDTH)
        writer.add_tensor(names.get_name(name, (".weight",)) or name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(path: Path) -> Iterator[Llama]:
    with Llama(path, n_ctx=POSITIONS, threads=1) as opened:
        yield opened


def expected(model: LlamaForCausalLM, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        values: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return values


def test_logits_at_every_position(llama: Llama, model: LlamaForCausalLM) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, POSITIONS).tolist()
    first = llama.logits(ids)
    assert first.dtype == np.float32 and np.abs(first - expected(model, ids)).max() < 1e-5
    # Every call starts over: neither the text before nor its length leaves a trace.
    assert np.abs(llama.logits(ids[5:9]) - expected(model, ids[5:9])).max() < 1e-5
    assert np.array_equal(llama.logits(ids), first)


def test_generation_is_greedy_and_stops(llama: Llama, model: LlamaForCausalLM) -> None:
    ids = [3, 1, 4]
    made = llama.generate(ids, 8)
    for token in made:
        assert token == expected(model, ids)[-1].argmax()
        ids.append(token)
    assert len(made) == 8 or llama.is_eog(made[-1])


def test_text(llama: Llama) -> None:
    assert llama.tokenize("CAB") == [2, 0, 1]
    assert llama.detokenize([2, 0, 1]) == "CAB"
    assert llama.meta("tokenizer.ggml.pre") == "gpt-2" and llama.meta("nothing") is None


def test_failures_say_why(llama: Llama, path: Path, tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="No such file"):
        Llama(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(LlamaError, match="magic"):
        Llama(tmp_path / "text.gguf")
    with pytest.raises(LlamaError, match="do not fit"):
        llama.logits([0] * (POSITIONS + 1))
    with pytest.raises(LlamaError, match="token ids"):
        llama.logits([VOCAB])
    with Llama(path, vocab_only=True) as vocab, pytest.raises(LlamaError, match="no weights"):
        vocab.logits([0])
