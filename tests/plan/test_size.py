"""A plan for a file: its exact size, header and tokenizer included, meets the budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.gguf.container import GgufContainer


def test_what_is_not_weights_takes_the_same_in_every_file(tiny) -> None:
    folder: Path = tiny("mixtral", num_hidden_layers=1)
    extra = set()
    for size in (700_000, 1_500_000):
        job = open_job(folder, Settings(size=str(size)))
        assert 0.98 * size < job.size <= size
        assert isinstance(job.container, GgufContainer)
        extra.add(job.container.overhead(job.plan))
    assert len(extra) == 1


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_size_that_is_said_is_the_size_that_is_written(tiny, tmp_path: Path, family: str) -> None:
    settings = Settings("BF16", eval_tokens=0)
    report = convert(tiny(family), tmp_path / "m.gguf", settings)
    size = (tmp_path / "m.gguf").stat().st_size
    assert open_job(tiny(family), settings).size == report.file_bytes == size
