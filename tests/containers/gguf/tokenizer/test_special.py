"""Special token ids, what is added around a text, and chat templates, down to what llama.cpp reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import TokenizerError
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.families import FAMILIES
from tests.containers.gguf.tokenizer.test_spec import edit, write

TURN = "<|im_end|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with tokens <|endoftext|> (0), <s> (1) and a last one, <|im_end|>."""
    made = folders.across_words(tmp_path / "tokenizer", FAMILIES["qwen 3"].pre_tokenizer)
    edit(made, lambda t: t["added_tokens"].append(folders.special(TURN, len(t["model"]["vocab"]))))
    return made


def configure(folder: Path, name: str = "tokenizer_config.json", **values: Any) -> None:
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def template(*single: str) -> dict[str, Any]:
    """A post-processor; "A" stands for the text, anything else for a special token."""
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if name == "A"
        else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in single
    ]
    ids = {folders.EOS: 0, folders.BOS: 1}
    known = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in single if name != "A"}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": known}


def test_the_tokenizers_own_file_wins(folder: Path) -> None:
    turn = len(read_tokenizer(folder).tokens) - 1
    configure(folder, eos_token={"content": folders.EOS}, bos_token=None, pad_token=folders.EOS)
    configure(folder, "generation_config.json", eos_token_id=[turn, 0], bos_token_id=1)
    configure(folder, "config.json", eos_token_id=5, pad_token_id=7)
    spec = read_tokenizer(folder)
    assert spec.ids == {"eos": 0, "bos": 1, "padding": 0, "eot": turn, "eom": 5}


def test_ends_that_do_not_fit_are_noted(folder: Path, tmp_path: Path) -> None:
    configure(folder, "generation_config.json", eos_token_id=[0, 300, 301, 302])
    spec = read_tokenizer(folder)
    assert [spec.ids[role] for role in ("eos", "eot", "eom")] == [0, 300, 301]
    (note,) = spec.notes
    assert "id 302" in note
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        assert [token for token in range(ours.n_vocab) if ours.is_eog(token)] == [
            0,
            300,
            301,
            ours.n_vocab - 1,
        ]


def test_multimodal_config_is_looked_into(folder: Path) -> None:
    configure(folder)
    configure(folder, "config.json", text_config={"eos_token_id": 0})
    assert read_tokenizer(folder).ids == {"eos": 0}


def test_nothing_that_ends_a_text_is_refused(folder: Path) -> None:
    configure(folder)
    with pytest.raises(TokenizerError, match="end-of-sequence"):
        read_tokenizer(folder)
    configure(folder, eos_token="<nowhere>")
    with pytest.raises(TokenizerError, match="<nowhere>"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    "single", [("A",), (folders.BOS, "A"), ("A", folders.EOS), (folders.BOS, "A", folders.EOS)]
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_added_around_a_text(
    folder: Path, tmp_path: Path, single: tuple[str, ...], inside: bool
) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = (
        {"type": "Sequence", "processors": [byte_level, template(*single)]} if inside else template(*single)
    )
    edit(folder, lambda t: t.update(post_processor=whole))
    spec = read_tokenizer(folder)
    assert (spec.add_bos, spec.add_eos) == (single[0] == folders.BOS, single[-1] == folders.EOS)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        assert ours.tokenize("two experts", add_special=True) == theirs("two experts")["input_ids"]


def test_bos_is_what_is_really_put_in_front(folder: Path) -> None:
    edit(folder, lambda t: t.update(post_processor=template(folders.EOS, "A")))
    spec = read_tokenizer(folder)
    assert (spec.ids["bos"], spec.add_bos) == (0, True)


def test_add_bos_token_and_post_processor_disagree(folder: Path) -> None:
    configure(folder, eos_token=folders.EOS, bos_token=folders.BOS, add_bos_token=True)
    spec = read_tokenizer(folder)
    assert spec.add_bos and "adds none" in spec.notes[0]
    configure(folder, eos_token=folders.EOS, bos_token=folders.BOS, add_bos_token=False)
    assert not read_tokenizer(folder).add_bos
    edit(folder, lambda t: t.update(post_processor=template(folders.BOS, "A")))
    spec = read_tokenizer(folder)
    assert spec.add_bos and "is false" in spec.notes[0]


def test_two_tokens_in_front_are_noted_and_none_added(folder: Path) -> None:
    edit(folder, lambda t: t.update(post_processor=template(folders.EOS, folders.BOS, "A")))
    spec = read_tokenizer(folder)
    assert not spec.add_bos and f"{folders.EOS} {folders.BOS}" in spec.notes[0]


def test_chat_templates(folder: Path, tmp_path: Path) -> None:
    inline = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]
    configure(folder, eos_token=folders.EOS, chat_template=inline)
    assert read_tokenizer(folder).chat_templates == (("default", "old"), ("tool_use", "tools"))
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag 2.jinja").write_text("documents")
    with Llama(write(read_tokenizer(folder), tmp_path / "v.gguf"), vocab_only=True) as ours:
        assert ours.meta("tokenizer.chat_template") == "new"
        assert ours.meta("tokenizer.chat_template.tool_use") == "tools"
        assert ours.meta("tokenizer.chat_template.rag_2") == "documents"


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_a_single_chat_template(folder: Path, name: str) -> None:
    configure(folder, eos_token=folders.EOS)
    configure(folder, name, eos_token=folders.EOS, chat_template="one")
    assert read_tokenizer(folder).chat_templates == (("default", "one"),)
