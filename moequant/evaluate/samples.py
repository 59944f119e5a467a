"""What a model says: greedy continuations by transformers, for versions that llama.cpp does not run.

The model is in memory as a whole, as float32: sampling a token at a time from layers on a disk would
read the whole model for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import CorpusError
from moequant.forward.experts import EXPERTS
from moequant.forward.memory import resident_bytes, usable_bytes
from moequant.forward.model import Provider, build_model
from moequant.runtimes.llama_cpp.serving import CONTEXT, Prompt, Sample
from moequant.text.rows import load_encoder


def fits(checkpoint: Checkpoint) -> bool:
    """Whether the whole model can be sampled in the memory that is free."""
    free = usable_bytes(None)
    return free is None or resident_bytes(checkpoint) < free


def sample(
    checkpoint: Checkpoint, provider: Provider, prompts: Iterable[Prompt], tokens: int
) -> tuple[Sample, ...]:
    """Up to `tokens` likeliest tokens after every prompt. CorpusError for a prompt without tokens, and for a
    model with an encoder, which continues no prompt."""
    if checkpoint.encodes:
        raise CorpusError(
            f"{checkpoint.path}: a model with an encoder answers a text and does not continue it; leave "
            "--prompt and --sample-tokens out"
        )
    model = build_model(checkpoint, EXPERTS, provider)
    tokenizer, encoder = read_tokenizer(checkpoint.path), load_encoder(checkpoint.path)
    start = [tokenizer.ids["bos"]] if tokenizer.add_bos and "bos" in tokenizer.ids else []
    ends = _ends(checkpoint)
    room = min(CONTEXT, checkpoint.shape.context) - tokens
    if room < 1:
        raise CorpusError(f"{checkpoint.path}: {tokens} tokens to sample do not fit the model's context")
    found = []
    for prompt in prompts:
        ids = start + encoder.encode(prompt.text, add_special_tokens=False).ids
        if not ids:
            raise CorpusError(f"prompt {prompt.name} has no tokens; give one that is not empty")
        cut = max(0, len(ids) - room)
        made = _greedy(model, ids[cut:], tokens, ends)
        text = encoder.decode(list(made), skip_special_tokens=False)
        found.append(Sample(prompt.name, len(ids) - cut, cut, made, text))
    return tuple(found)


def _ends(checkpoint: Checkpoint) -> set[int]:
    """Tokens after which nothing is generated."""
    end = checkpoint.config.eos_token_id
    if end is None:
        return set()
    return {int(one) for one in end} if isinstance(end, Sequence) else {int(end)}


@torch.inference_mode()
def _greedy(model: torch.nn.Module, ids: Sequence[int], tokens: int, ends: set[int]) -> tuple[int, ...]:
    made: list[int] = []
    feed, cache = list(ids), None
    for _ in range(tokens):
        answer = model(torch.tensor([feed]), cache=cache, use_cache=True, logits_to_keep=1)
        cache = answer.cache
        feed = [int(answer.logits[0, -1].argmax())]
        made += feed
        if feed[0] in ends:
            break
    return tuple(made)
