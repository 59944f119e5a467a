"""Rows for one model: no longer than it can take, probes apart from what calibrates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moequant.checkpoint import open_checkpoint
from moequant.errors import CorpusError, TokenizerError
from moequant.text.corpus import Document, Rows
from moequant.text.rows import ROW, calibration_rows, load_encoder, probed_rows, split_probes, token_rows
from tests import models


@pytest.mark.parametrize(("context", "length"), [(256, 256), (ROW, ROW), (1024, ROW)])
def test_rows_are_cut_to_a_short_context(tmp_path: Path, context: int, length: int) -> None:
    """The best known tiny Mixtral takes 256 tokens."""
    checkpoint = open_checkpoint(models.build(tmp_path, "qwen3", max_position_embeddings=context))
    documents = [Document("a", "\n".join(models.TEXT)), Document("b", "\n".join(models.TEXT * 2))]
    for make in (token_rows, calibration_rows):
        rows = make(checkpoint, documents, 4 * length, 0, None)
        assert rows.ids.shape == (4, length) and rows.tokens == 4 * length
    with pytest.raises(CorpusError):
        token_rows(checkpoint, [Document("a", "too short")], 4 * length, 0, None)


@given(count=st.integers(1, 60), most=st.integers(1, 20))
def test_probes_and_calibration_share_no_row(count: int, most: int) -> None:
    rows = Rows(torch.arange(count)[:, None], tuple(map(str, range(count))), "numbers", count)
    kept, probes = split_probes(rows, most)
    assert len(probes.ids) == min(most, max(1, count // 8))
    if count > 1:
        assert sorted([*kept.ids[:, 0].tolist(), *probes.ids[:, 0].tolist()]) == list(range(count))
    else:
        assert torch.equal(kept.ids, probes.ids), "a single row serves both"
    for part in (kept, probes):
        assert part.domains == tuple(map(str, part.ids[:, 0].tolist())) and part.tokens == len(part.ids)


@pytest.mark.parametrize(
    ("wanted", "probes"), [(2, 1), (6, 1), (7, 1), (8, 1), (14, 2), (63, 9), (112, 16), (200, 16)]
)
def test_as_many_tokens_calibrate_as_were_asked_for(tmp_path: Path, wanted: int, probes: int) -> None:
    """What probes is drawn besides; of 8,192 tokens asked for 14,336 once calibrated."""
    checkpoint = open_checkpoint(models.build(tmp_path, "qwen3", max_position_embeddings=8))
    documents = [Document(str(at), "\n".join(models.TEXT * 5)) for at in range(20)]
    for tokens in (8 * wanted, 8 * wanted + 7):
        kept, others = probed_rows(checkpoint, documents, tokens, 0, None, 16)
        assert (len(kept.ids), len(others.ids)) == (wanted, probes)
    with pytest.raises(CorpusError, match=r"a budget of 15 tokens: .*; raise --calib-tokens$"):
        probed_rows(checkpoint, documents, 15, 0, None, 16)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        load_encoder(tmp_path)


def test_a_tokenizer_is_a_regular_file_of_a_bounded_size(tmp_path: Path) -> None:
    """The library would read a device until the machine has no memory left, and a pipe for ever."""
    file = tmp_path / "tokenizer.json"
    for make, told in (
        (lambda: file.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda: os.mkfifo(file), "is not a regular file"),
        (lambda: (file.touch(), os.truncate(file, 10**10)), "10,000,000,000 bytes"),
        (lambda: file.write_bytes(b"\xff{}"), "cannot be read"),
    ):
        make()
        with pytest.raises(TokenizerError, match=told):
            load_encoder(tmp_path)
        file.unlink()
