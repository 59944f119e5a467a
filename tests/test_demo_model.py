"""The trained model in demo/: what it is, that it learned something, and the program that trained it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moequant.text import bundled
from scripts import train_demo, training

DEMO = bundled.path("demo")
WINDOW = 512


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows i64[n, 512] of the bundled evaluation text, all domains."""
    texts = [text for texts in bundled.texts("evaluation").values() for text in texts]
    tokens = torch.tensor(tokenizer.encode(tokenizer.eos_token.join(texts), verbose=False))
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def test_it_is_a_small_qwen3_moe():
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["norm_topk_prob"] is True
    assert config["tie_word_embeddings"] is False
    assert (DEMO / "model.safetensors").stat().st_size < 9.5e6


def test_every_weight_is_bfloat16_and_every_expert_a_tensor_of_its_own():
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}
        assert {piece.get_dtype() for piece in tensors.values()} == {"BF16"}
    experts = [name for name in tensors if ".mlp.experts." in name]
    assert len(experts) == 2 * 8 * 3
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in experts
    assert "lm_head.weight" in tensors


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n\treturn x  # naïve\r\n\n\n", "日本語 и русский", "👩‍💻  \u00a0 end ", "12345,67 = a-b"],
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_is_one_that_llama_cpp_knows(tokenizer):
    parts = json.loads((DEMO / "tokenizer.json").read_text())
    split, byte_level = parts["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": train_demo.QWEN2_SPLIT}
    assert byte_level["type"] == "ByteLevel"
    assert parts["normalizer"] is None
    assert len(tokenizer) == 2048


def test_the_chat_template_writes_chatml(tokenizer):
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 1


@torch.no_grad()
def test_it_predicts_held_out_text_far_better_than_token_frequencies_do(model, windows):
    nats = sum(
        F.cross_entropy(model(w[:, :-1]).logits.flatten(0, 1), w[:, 1:].flatten(), reduction="sum").item()
        for w in windows.split(8)
    )
    perplexity = math.exp(nats / windows[:, 1:].numel())
    # The frequencies of this very text: no unigram model, however trained, does better on it.
    frequency = windows.flatten().bincount().double() / windows.numel()
    unigram = torch.special.entr(frequency).sum().exp().item()
    assert perplexity < 0.2 * unigram


@torch.no_grad()
def test_its_experts_are_all_in_use_and_not_evenly(model, windows):
    router_logits = model(windows[::4], output_router_logits=True).router_logits
    for logits in router_logits:
        load = logits.topk(2).indices.flatten().bincount(minlength=8) / logits.shape[0] / 2
        assert load.min() > 0.002
        assert load.max() > 1.3 * load.mean()


@torch.no_grad()
def test_the_experts_function_it_was_trained_with_is_the_models_own(model, windows):
    tokens = windows[:2]
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    model.set_experts_implementation("sorted")
    assert torch.allclose(model(tokens).logits, expected, atol=1e-4)


def test_the_balance_loss_is_one_for_an_even_load_and_grows_with_favourites():
    even = torch.eye(8).repeat(4, 1) + torch.eye(8).roll(1, 0).repeat(4, 1)
    assert training.imbalance(even, 2).item() == pytest.approx(1)
    favourite = even.clone()
    favourite[:, 3] += 5
    assert training.imbalance(favourite, 2).item() > 1.5


def test_training_lowers_the_loss(tokenizer):
    model = train_demo.new_model(tokenizer, seed=0)
    # A text of few tokens: four steps are enough to learn which.
    data = training.rows(torch.arange(3).repeat(training.ROW * training.BATCH), seed=0)
    probe = next(data)[None]
    before = model(probe, labels=probe).loss.item()
    assert training.train(model, data, training.Recipe(steps=4)) == 4
    assert model(probe, labels=probe).loss.item() < 0.8 * before


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (3, 48, 32)])
def test_muon_takes_steps_of_nearly_equal_length_in_every_direction(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(training.orthogonal(matrix))
    # The five steps are tuned for speed, not for exactness: they land within about 0.7 to 1.2.
    assert singular.min() > 0.6 and singular.max() < 1.3
