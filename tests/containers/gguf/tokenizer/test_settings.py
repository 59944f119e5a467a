"""Wrong values in the files beside the vocabulary: one line that names the file and the key."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moequant.containers.gguf.tokenizer.settings import read_settings
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import TokenizerError
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.families import FAMILIES

TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders.across_words(tmp_path, FAMILIES["qwen 3"].pre_tokenizer)


def configure(folder: Path, name: str, **values: Any) -> None:
    before = {"eos_token": folders.EOS} if name == TOKENIZER else {}
    (folder / name).write_text(json.dumps({**before, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "values", "key"),
    [
        (TOKENIZER, {"eos_token": 5}, "eos_token is 5"),
        (TOKENIZER, {"bos_token": {"content": None}}, "bos_token.content is None"),
        (TOKENIZER, {"bos_token": {}}, "bos_token.content"),
        (TOKENIZER, {"pad_token": ["<pad>"]}, "pad_token is"),
        (TOKENIZER, {"unk_token": "\ud800"}, "whole characters"),
        (TOKENIZER, {"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        (TOKENIZER, {"added_tokens_decoder": []}, "added_tokens_decoder is []"),
        (TOKENIZER, {"added_tokens_decoder": {"x": {"content": "a"}}}, "x is"),
        (TOKENIZER, {"added_tokens_decoder": {"7": None}}, "7 is"),
        (TOKENIZER, {"added_tokens_decoder": {"7": {"content": ""}}}, "7 is"),
        (TOKENIZER, {"added_tokens_decoder": {"7": {"content": "a", "special": 1}}}, "special is 1"),
        (TOKENIZER, {"added_tokens_decoder": {"99999999999": {"content": "qzq"}}}, "id 99999999999"),
        (TOKENIZER, {"chat_template": 3}, "chat_template is 3"),
        (TOKENIZER, {"chat_template": [3]}, "chat_template is 3"),
        (TOKENIZER, {"chat_template": [{"name": "a"}]}, "chat_template is"),
        (TOKENIZER, {"chat_template": [{"name": "a", "template": "b"}] * 2}, "a name of its own"),
        (TOKENIZER, {"chat_template": {"a": None}}, "chat_template is"),
        (TOKENIZER, {"chat_template": "\udc00"}, "whole characters"),
        (GENERATION, {"eos_token_id": "2"}, "eos_token_id is '2'"),
        (GENERATION, {"eos_token_id": [2, None]}, "eos_token_id is"),
        (GENERATION, {"bos_token_id": True}, "bos_token_id is True"),
        (GENERATION, {"pad_token_id": 1.5}, "pad_token_id is 1.5"),
        ("config.json", {"text_config": 3}, "text_config is 3"),
        ("config.json", {"text_config": {"eos_token_id": {}}}, "text_config: eos_token_id is {}"),
        ("special_tokens_map.json", {"bos_token": 0}, "bos_token is 0"),
        ("chat_template.json", {"chat_template": 3}, "chat_template is 3"),
    ],
)
def test_wrong_values_are_named(folder: Path, file: str, values: dict[str, Any], key: str) -> None:
    configure(folder, file, **values)
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(folder)
    message = str(caught.value)
    assert key in message and "expected" in message and len(message.splitlines()) == 1
    assert file in message or "added_tokens_decoder" in values


def test_nulls_mean_absent(folder: Path) -> None:
    before = read_tokenizer(folder)
    nulls = dict.fromkeys(
        ("bos_token", "unk_token", "add_bos_token", "added_tokens_decoder", "chat_template")
    )
    configure(folder, TOKENIZER, **nulls)
    configure(folder, GENERATION, eos_token_id=None, bos_token_id=1, pad_token_id=-1)
    configure(folder, "config.json", text_config=None, eos_token_id=None)
    assert read_tokenizer(folder) == before


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", [TOKENIZER, "config.json", "tokenizer.json"])
def test_files_that_hold_no_object_are_named(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=file):
        read_tokenizer(folder)


def test_a_template_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        read_tokenizer(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["content", "name", "7"]), inner)
    ),
    max_leaves=4,
)
KEYS = "eos_token bos_token added_tokens_decoder chat_template add_bos_token eos_token_id text_config"


@given(st.dictionaries(st.sampled_from(KEYS.split()), JSON, min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_values_are_read_or_named(tmp_path: Path, values: dict[str, Any]) -> None:
    for name in (TOKENIZER, "config.json"):
        (tmp_path / name).write_text(json.dumps(values))
    try:
        found = read_settings(tmp_path)
        for section in (found.tokenizer, found.model, found.inner_model):
            section.token("eos_token"), section.flag("add_bos_token"), section.ids("eos_token_id")
            section.added_tokens()
    except TokenizerError as error:
        assert len(str(error).splitlines()) == 1
