"""Families' turns: which tokens begin a text and end an answer, and chat templates, down to libllama.

Vocabularies here are small, their special tokens and the files beside them are those of the published models.
"""

import ctypes as C
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from moequant.containers.gguf.tokenizer.spec import Kind, read_tokenizer
from moequant.runtimes.llama_cpp.binding import library
from tests.clients.llama import Llama
from tests.containers.gguf.tokenizer import folders
from tests.containers.gguf.tokenizer.families import FAMILIES
from tests.containers.gguf.tokenizer.test_spec import edit, write

CALIB = Path(__file__).parents[4] / "calib"


@dataclass(frozen=True)
class Turns:
    """tokens: special tokens, "-" in front of those that Hugging Face does not call special.
    config: tokenizer_config.json. ends: what generation_config.json lists as the end.
    roles: what is written. stops: tokens at which llama.cpp must stop besides `ends`."""

    splitting: str
    tokens: str
    config: dict[str, Any]
    ends: str
    roles: dict[str, str]
    stops: str = ""
    template: str = ""
    visible: str = ""
    adds_bos: bool = False


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HARMONY = (
    "{# <|channel|> #}{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
KIMI = (
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
LLAMA4 = (
    "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
GEMMA4 = (
    "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
FAMILY = {
    "qwen 3": Turns(
        "qwen 3",
        "<|endoftext|> <|im_start|> <|im_end|> -<think> -</think>",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None},
        "<|im_end|> <|endoftext|>",
        {"eos": "<|im_end|>", "eot": "<|im_end|>", "padding": "<|endoftext|>"},
        template=CHATML,
        visible="<think> </think>",
    ),
    "glm 4.5": Turns(
        "llama 3",
        "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>",
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "<|endoftext|> <|user|> <|observation|>",
        {
            "bos": "[gMASK]",
            "eos": "<|endoftext|>",
            "eot": "<|user|>",
            "eom": "<|observation|>",
            "unknown": "<|endoftext|>",
            "padding": "<|endoftext|>",
        },
        template=GLM,
    ),
    "glm without generation_config.json": Turns(
        "llama 3",
        "<|endoftext|> [gMASK] <sop> <|user|> <|assistant|> <|observation|>",
        {"eos_token": "<|endoftext|>"},
        "",
        {
            "bos": "[gMASK]",
            "eos": "<|endoftext|>",
            "eot": "<|user|>",
            "eom": "<|observation|>",
            "unknown": "<|endoftext|>",
        },
        stops="<|endoftext|> <|user|> <|observation|>",
    ),
    "gpt-oss": Turns(
        "gpt-oss",
        "<|startoftext|> <|endoftext|> <|return|> <|channel|> <|start|> <|end|> <|message|> <|call|>",
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        "<|return|> <|endoftext|> <|call|>",
        {
            "bos": "<|startoftext|>",
            "eos": "<|return|>",
            "eot": "<|return|>",
            "eom": "<|call|>",
            "padding": "<|endoftext|>",
        },
        template=HARMONY,
    ),
    "kimi k2": Turns(
        "kimi",
        "[BOS] [EOS] <|im_end|> <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> [EOT] [PAD]",
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"},
        "<|im_end|>",
        {"bos": "[BOS]", "eos": "[EOS]", "eot": "<|im_end|>", "padding": "[PAD]"},
        # llama.cpp takes [PAD] for the padding of fill-in-the-middle, which ends a text.
        stops="[EOS] [EOT] [PAD]",
        template=KIMI,
    ),
    "kimi k3": Turns(
        "kimi",
        "[BOS] [EOS] <|im_end|> <|im_middle|> <|end_of_msg|>",
        {"bos_token": "[BOS]", "eos_token": "[EOS]"},
        "<|end_of_msg|>",
        {"bos": "[BOS]", "eos": "[EOS]", "eot": "<|im_end|>", "eom": "<|end_of_msg|>"},
        stops="[EOS] <|im_end|>",
    ),
    "llama 4": Turns(
        "gpt-oss",
        "<|begin_of_text|> <|end_of_text|> <|header_start|> <|header_end|> <|eom|> <|eot|>",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"},
        "<|end_of_text|> <|eom|> <|eot|>",
        {"bos": "<|begin_of_text|>", "eos": "<|eot|>", "eot": "<|eot|>", "eom": "<|eom|>"},
        template=LLAMA4,
    ),
    "gemma 4": Turns(
        "",
        '<bos> <eos> <|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <|"|>',
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        "<eos> <turn|> <|tool_response>",
        {"bos": "<bos>", "eos": "<eos>", "eot": "<turn|>", "unknown": "<unk>"},
        template=GEMMA4,
        visible='<|channel> <channel|> <|tool_call> <tool_call|> <|"|>',
        adds_bos=True,
    ),
    "laguna": Turns(
        "laguna",
        "<|EOS|> -<assistant> -</assistant>",
        {"bos_token": "<|EOS|>", "eos_token": "<|EOS|>"},
        "<|EOS|> </assistant>",
        {"bos": "<|EOS|>", "eos": "<|EOS|>", "eot": "</assistant>"},
        visible="<assistant>",
    ),
    "solar open": Turns(
        "qwen 3",
        "<|startoftext|> <|endoftext|> <unk> <|begin|> <|end|> <|flush|> <|calls|>",
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
        "<|flush|> <|calls|> <|endoftext|>",
        {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "eot": "<|flush|>", "unknown": "<unk>"},
    ),
    "dots": Turns(
        "qwen 3",
        "<|endoftext|> <|userprompt|> <|endofuserprompt|> <|response|> <|endofassistant|>",
        {"eos_token": "<|endoftext|>"},
        "",
        {"eos": "<|endoftext|>", "eot": "<|endofassistant|>"},
        stops="<|endoftext|> <|endofassistant|>",
    ),
    "ling 2": Turns(
        "ling",
        "<|startoftext|> <|endoftext|> <|role_end|>",
        {"bos_token": "<|startoftext|>", "eos_token": "<|role_end|>", "pad_token": "<|endoftext|>"},
        "<|endoftext|> <|role_end|>",
        {
            "bos": "<|startoftext|>",
            "eos": "<|role_end|>",
            "eot": "<|endoftext|>",
            "padding": "<|endoftext|>",
        },
    ),
}


def make(folder: Path, turns: Turns) -> Path:
    """A folder with a family's special tokens behind a small vocabulary."""
    if turns.splitting:
        folders.across_words(folder, FAMILIES[turns.splitting].pre_tokenizer)
    else:
        shape = {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
        folders.sentencepiece_style(folder, folders.ESCAPE, shape)

    def change(content: Any) -> None:
        old = [token for token in content["added_tokens"] if token["content"] != "<unk>"]
        content["added_tokens"] = [token for token in content["added_tokens"] if token not in old]
        content["post_processor"] = None
        vocab = content["model"]["vocab"]
        for token in old:
            vocab[f"qzj{token['id']}"] = vocab.pop(token["content"])
        for i, text in enumerate(turns.tokens.split(), len(vocab)):
            special = not text.startswith("-")
            content["added_tokens"].append(folders.special(text.removeprefix("-"), i, special=special))

    edit(folder, change)
    config = {**turns.config, "chat_template": turns.template or None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    ends = [ids[text] for text in turns.ends.split()]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends} if ends else {}))
    return folder


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_roles_and_stops(name: str, tmp_path: Path) -> None:
    turns = FAMILY[name]
    spec = read_tokenizer(make(tmp_path, turns))
    assert {role: spec.tokens[i] for role, i in spec.ids.items()} == turns.roles
    assert spec.add_bos == turns.adds_bos
    assert not any("does not stop" in note for note in spec.notes)
    kinds = dict(zip(spec.tokens, spec.types, strict=True))
    assert {kinds[text] for text in turns.visible.split()} <= {Kind.USER_DEFINED}
    assert {kinds[text] for text in turns.ends.split() if text != "<|tool_response>"} <= {Kind.CONTROL}
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        stops = {spec.tokens[i] for i in range(ours.n_vocab) if ours.is_eog(i)}
        assert ours.add_bos == turns.adds_bos
        assert ours.bos == spec.ids.get("bos", ours.bos)
    assert stops == {*turns.ends.split(), *turns.stops.split()}


def conversations() -> list[list[dict[str, str]]]:
    """The bundled conversations, which the calibration text has as ChatML."""
    found = []
    for path in sorted(CALIB.glob("*/conversation/*.txt")):
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", path.read_text(encoding="utf-8"), re.S)
        turns = [(role, content) for role, content in turns if role in ("system", "user", "assistant")]
        if turns:
            found.append([{"role": role, "content": content} for role, content in turns[:6]])
    return found


class _Message(C.Structure):
    _fields_ = (("role", C.c_char_p), ("content", C.c_char_p))


def llamas_rendering(template: str, messages: list[dict[str, str]]) -> str:
    """What llama.cpp's own implementation of a known template makes of a conversation."""
    apply = C.CDLL(library()._dll._name).llama_chat_apply_template
    apply.restype = C.c_int32
    apply.argtypes = (C.c_char_p, C.c_void_p, C.c_size_t, C.c_bool, C.c_char_p, C.c_int32)
    chat = (_Message * len(messages))(*((m["role"].encode(), m["content"].encode()) for m in messages))
    buffer = C.create_string_buffer(1 << 16)
    size = apply(template.encode(), chat, len(messages), True, buffer, len(buffer))
    return buffer.raw[:size].decode()


@pytest.mark.parametrize("name", sorted(name for name, turns in FAMILY.items() if turns.template))
def test_rendered_conversations_have_the_same_ids(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, FAMILY[name])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    spec = read_tokenizer(folder)
    talks = conversations()
    assert len(talks) > 4
    with Llama(write(spec, tmp_path / "v.gguf"), vocab_only=True) as ours:
        template = ours.meta("tokenizer.chat_template")
        assert template == FAMILY[name].template
        for messages in talks:
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if name != "gemma 4":  # llama.cpp knows that template from Jinja alone.
                assert llamas_rendering(template, messages) == text
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            if name == "kimi k2":  # A change of case is split by Hugging Face only, as the note says.
                assert [i for i in ids if i in theirs.all_special_ids] == [
                    i for i in ours.tokenize(text) if i in theirs.all_special_ids
                ]
            else:
                assert ours.tokenize(text) == ids
