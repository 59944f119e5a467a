"""Special token ids, what is put around a text, and chat templates: the files beside tokenizer.json."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moequant.errors import TokenizerError

Lookup = Callable[[str], int | None]

# Texts at which llama.cpp ends generation whatever the ids say (src/llama-vocab.cpp, b11434).
_ALWAYS_END = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>"
    " <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>"
    " <｜end▁of▁sentence｜> [e~[".split()
)
# Texts that it takes for special tokens besides, even where they are ordinary words of a vocabulary.
_ALWAYS_SPECIAL = _ALWAYS_END | frozenset(
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>"
    " <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>"
    " <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>"
    " <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"
    " <|file_sep|> <|channel|> <|message|> <|start|> <|constrain|>".split()
)
_ENDS_A_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True, slots=True)
class Settings:
    """The JSON files of a model folder that speak of special tokens; absent ones are empty."""

    tokenizer: Mapping[str, Any]
    special_map: Mapping[str, Any]
    generation: Mapping[str, Any]
    model: Mapping[str, Any]


def read_settings(folder: Path) -> Settings:
    model = read_json(folder / "config.json", optional=True)
    return Settings(
        tokenizer=read_json(folder / "tokenizer_config.json", optional=True),
        special_map=read_json(folder / "special_tokens_map.json", optional=True),
        generation=read_json(folder / "generation_config.json", optional=True),
        # Multimodal configs keep the language model's ids one level down.
        model={**model.get("text_config", {}), **model},
    )


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; TokenizerError when it is missing (unless optional) or not an object."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{path}: expected readable JSON, got {error}; is the download complete?"
        ) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def special_ids(
    settings: Settings, lookup: Lookup, text_of: Callable[[int], str]
) -> tuple[dict[str, int], list[str]]:
    """Ids for the roles bos, eos, eot, eom, unknown, padding, as far as the folder names them; and notes.

    The tokenizer's own files win over generation_config.json, and that over config.json. Raises
    TokenizerError when nothing ends a text: llama.cpp would then take id 11 (or 2) for that.
    """
    roles = {"bos": "bos", "unknown": "unk", "padding": "pad"}
    ids = {role: found[0] for role, name in roles.items() if (found := _candidates(name, settings, lookup))}
    ends = _candidates("eos", settings, lookup)
    if not ends:
        raise TokenizerError(
            "no end-of-sequence token; expected eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    ids["eos"] = ends[0]
    turn = [i for i in ends if text_of(i) in _ENDS_A_TURN] or ends[1:]
    if turn:
        ids["eot"] = turn[0]
    rest = [i for i in ends if i not in ids.values() and text_of(i) not in _ALWAYS_END]
    message = lookup("<|eom_id|>")
    if message is not None:
        ids["eom"] = message
    elif rest:
        ids["eom"] = rest.pop(0)
    return ids, [
        f"llama.cpp does not stop at {text_of(i)!r} (id {i}), which generation_config.json lists"
        for i in rest
    ]


def _candidates(name: str, settings: Settings, lookup: Lookup) -> list[int]:
    """Every id the folder gives for bos, eos, unk or pad, the most binding first, none twice."""
    found: list[int] = []
    for file in (settings.tokenizer, settings.special_map):
        entry = file.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            continue
        token = lookup(text)
        if token is None and name in ("bos", "eos"):
            raise TokenizerError(
                f"{name}_token {text!r} is not in tokenizer.json; expected one of its tokens"
            )
        if token is not None:
            found.append(token)
    for file in (settings.generation, settings.model):
        value = file.get(f"{name}_token_id")
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
    return list(dict.fromkeys(found))


def stolen_words(ordinary: Iterable[str]) -> list[str]:
    """Notes on ordinary tokens that llama.cpp takes for special ones by their text, such as Qwen's "</s>"."""
    return [
        f"text {text!r}: llama.cpp takes the ordinary token for a special one"
        + (" that ends generation" if text in _ALWAYS_END else "")
        for text in ordinary
        if text in _ALWAYS_SPECIAL
    ]


def frame(post_processor: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """The special tokens that Hugging Face puts before and after a text: (before, after)."""
    if post_processor is None:
        return [], []
    match post_processor.get("type"):
        case "Sequence":
            parts = [frame(part) for part in post_processor["processors"]]
            return [t for before, _ in parts for t in before], [t for _, after in parts for t in after]
        case "TemplateProcessing":
            pieces = [piece.get("SpecialToken", {}).get("id") for piece in post_processor["single"]]
            text = pieces.index(None) if None in pieces else len(pieces)
            return pieces[:text], [p for p in pieces[text:] if p is not None]
        case "RobertaProcessing" | "BertProcessing":
            return [post_processor["cls"][0]], [post_processor["sep"][0]]
        case "ByteLevel":
            return [], []
        case other:
            raise TokenizerError(
                f"tokenizer.json: post-processor {other!r} is unknown; expected TemplateProcessing"
            )


@dataclass(frozen=True, slots=True)
class Added:
    """Which of BOS and EOS are added to a text, and the tokens that play the part."""

    bos: bool
    eos: bool
    ids: Mapping[str, int]
    notes: tuple[str, ...]


def added_around(
    post_processor: Mapping[str, Any] | None, settings: Settings, lookup: Lookup, ids: Mapping[str, int]
) -> Added:
    """What llama.cpp should add around a text.

    tokenizer.json's post-processor is what Hugging Face runs (transformers 5 reads nothing else when the file
    exists). One exception: `add_bos_token: true` in tokenizer_config.json without such a post-processor, as
    in DeepSeek-V3, was obeyed by transformers 4 and is how those models were trained, so it is obeyed here.
    """
    notes: list[str] = []
    out: dict[str, int] = {}
    adds: dict[str, bool] = {}
    for role, tokens in zip(("bos", "eos"), frame(post_processor), strict=True):
        wanted = settings.tokenizer.get(f"add_{role}_token")
        adds[role] = len(tokens) == 1
        if len(tokens) > 1:
            notes.append(
                f"Hugging Face adds {' '.join(tokens)} around a text; llama.cpp can add one, so adds none"
            )
        elif tokens:
            token = lookup(tokens[0])
            if token is None:
                raise TokenizerError(
                    f"tokenizer.json: post-processor adds {tokens[0]!r}, which is not a token"
                )
            out[role] = token
            if wanted is False:
                notes.append(f"add_{role}_token is false but tokenizer.json adds {tokens[0]!r}; it is added")
        elif wanted is True and role in ids:
            adds[role] = True
            notes.append(
                f"add_{role}_token is true though tokenizer.json's post-processor adds none; it is added"
            )
    return Added(bos=adds["bos"], eos=adds["eos"], ids=out, notes=tuple(notes))


def chat_templates(folder: Path, settings: Settings) -> tuple[tuple[str, str], ...]:
    """(name, template) pairs, "default" first; template files win over tokenizer_config.json."""
    templates: dict[str, str] = {}
    inline = settings.tokenizer.get("chat_template")
    if inline is None:
        inline = read_json(folder / "chat_template.json", optional=True).get("chat_template")
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        templates = {entry["name"]: entry["template"] for entry in inline}
    elif isinstance(inline, dict):
        templates = dict(inline)
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for path in files:
        if path.is_file():
            name = "default" if path is files[0] else path.stem
            templates[name] = path.read_text(encoding="utf-8")
    return tuple(sorted(templates.items(), key=lambda item: (item[0] != "default", item[0])))
