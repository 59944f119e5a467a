"""How a GGUF file runs in llama.cpp: timed and sampled in a process of its own, whose memory is the model's.

`serve` starts one for every file, a job as JSON on its standard input and the result on its output.
Cache and attention are llama.cpp's defaults unless a cache is asked for; decoding is greedy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moequant.errors import MoequantError
from moequant.progress import peak_bytes, resident_bytes
from moequant.runtimes.llama_cpp.binding import LlamaError
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.runtimes.llama_cpp.isolated import ask

CONTEXT = 4096
"""Positions at most; fewer where the model was made for fewer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue, by name."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What came after a prompt: `text`, greedy, its tokens, and when each of them came.

    `fed` tokens of the prompt were read, its last ones where `cut` did not fit the context.
    `seconds` are the token's own: the first includes reading the prompt. Empty: not timed.
    """

    prompt: str
    fed: int
    cut: int
    ids: tuple[int, ...]
    text: str
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Serving:
    """One file in llama.cpp. `load_seconds` until the context is ready; `bytes` that the process
    grew by from before loading to its peak, `process_bytes` with the interpreter."""

    n_ctx: int
    threads: int
    load_seconds: float
    bytes: int
    process_bytes: int
    samples: tuple[Sample, ...]

    def first_token(self, prompt: str) -> float:
        """Seconds from the prompt to its first token."""
        return next(one.seconds[0] for one in self.samples if one.prompt == prompt)

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens a second, of the longest prompt."""
        longest = max(self.samples, key=lambda one: one.fed)
        return longest.fed / longest.seconds[0]

    @property
    def latencies(self) -> list[float]:
        """Seconds of every token but the first of each sample, sorted."""
        return sorted(second for one in self.samples for second in one.seconds[1:])

    @property
    def speed(self) -> float | None:
        """Tokens generated a second; None when no sample has two."""
        found = self.latencies
        return len(found) / sum(found) if found else None

    def latency(self, share: float) -> float | None:
        """The latency that `share` of the tokens do not exceed, such as 0.95."""
        found = self.latencies
        return found[min(len(found) - 1, int(share * len(found)))] if found else None


def serve(
    path: Path, prompts: Sequence[Prompt], tokens: int, threads: int, cache: str | None = None
) -> Serving:
    """Load the file in a fresh process and continue every prompt by up to `tokens` tokens. Keys and values
    are kept as `cache` says; see `Llama`.

    Raises LlamaError with what llama.cpp said when it refuses or the process ends early.
    """
    job = {
        "path": str(path),
        "tokens": tokens,
        "threads": threads,
        "cache": cache,
        "prompts": [asdict(prompt) for prompt in prompts],
    }
    found = json.loads(ask(__name__, job, f"{path}: llama.cpp did not get through the prompts"))
    samples = [
        Sample(**one | {"ids": tuple(one["ids"]), "seconds": tuple(one["seconds"])})
        for one in found.pop("samples")
    ]
    return Serving(**found, samples=tuple(samples))


def _child(job: dict[str, Any]) -> Serving:
    """The job itself, in the process that `serve` started."""
    path, tokens, threads = Path(job["path"]), int(job["tokens"]), int(job["threads"])
    idle = resident_bytes()
    n_ctx = min(CONTEXT, trained_context(path) or CONTEXT)
    if tokens >= n_ctx:
        raise LlamaError(f"{path}: {tokens} tokens to sample do not fit the model's context of {n_ctx}")
    start = time.perf_counter()
    with Llama(path, n_ctx=n_ctx, threads=threads, cache=job["cache"]) as model:
        model.warm_up()
        load = time.perf_counter() - start
        samples = tuple(_sample(model, Prompt(**prompt), tokens) for prompt in job["prompts"])
    peak = peak_bytes()
    return Serving(n_ctx, threads, load, peak - idle, peak, samples)


def trained_context(path: Path) -> int | None:
    """The tokens that a model was trained for, None where its file does not say."""
    with Llama(path, vocab_only=True) as model:
        trained = model.meta(f"{model.meta('general.architecture')}.context_length")
    return None if trained is None else int(trained)


def _sample(model: Llama, prompt: Prompt, tokens: int) -> Sample:
    ids = model.tokenize(prompt.text, add_special=True)
    if not ids:
        raise LlamaError(f"prompt {prompt.name} has no tokens; give one that is not empty")
    cut = max(0, len(ids) - (model.n_ctx - tokens))
    made: list[int] = []
    seconds: list[float] = []
    last = time.perf_counter()
    for token in model.stream(ids[cut:], tokens):
        now = time.perf_counter()
        made.append(token)
        seconds.append(now - last)
        last = now
    text = model.detokenize(made)
    return Sample(prompt.name, len(ids) - cut, cut, tuple(made), text, tuple(seconds))


def main() -> None:
    """Reads a job from standard input, writes its result to standard output."""
    try:
        found = _child(json.load(sys.stdin))
    except MoequantError as error:
        sys.exit(str(error))
    json.dump(asdict(found), sys.stdout)
