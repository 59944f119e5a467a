"""A plan for a file: its exact size, header and tokenizer included, meets the budget."""

from __future__ import annotations

from pathlib import Path

import moequant
from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import facts
from moequant.containers.gguf import write as gguf
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.plan import Budget
from moequant.plan.planner import choose, overhead


def test_what_is_not_weights_takes_the_same_in_every_file(tiny) -> None:
    folder: Path = tiny("mixtral", num_hidden_layers=1)
    checkpoint, tokenizer = open_checkpoint(folder), read_tokenizer(folder)
    provenance = {"general.quantized_by": f"moequant {moequant.__version__}"}
    extra = overhead(checkpoint, tokenizer, provenance)
    for size in (700_000, 1_500_000):
        plan = choose(checkpoint, facts(checkpoint), Budget.of_size(str(size)), extra)
        made = gguf.file_bytes(checkpoint, tokenizer, plan, provenance)
        assert 0.98 * size < made <= size
