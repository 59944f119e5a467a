"""Special token ids, what is put around a text, and what ends a turn."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import TokenType as Kind

from moequant.containers.gguf.tokenizer.settings import Settings
from moequant.containers.gguf.tokenizer.vocabulary import Entry, Source
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
_ENDS_A_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<turn|>", "</assistant>")


@dataclass(frozen=True, slots=True)
class Habit:
    """What the tokens of a family mean, where its files do not say so.

    marks:   texts that only vocabularies of this family have together.
    roles:   role to text; bos, unknown and padding only if nothing else names them.
    visible: texts of special tokens that llama.cpp must print, for its chat parsers read them.
    bos:     whether a text begins with BOS although the tokenizer's files do not say it.
    """

    marks: tuple[str, ...]
    roles: Mapping[str, str]
    visible: tuple[str, ...] = ()
    bos: bool = False


HABITS = (
    # GLM: <|endoftext|> does not end a turn, the next role does.
    Habit(
        ("[gMASK]", "<|user|>", "<|observation|>"),
        {"bos": "[gMASK]", "eot": "<|user|>", "eom": "<|observation|>", "unknown": "<|endoftext|>"},
    ),
    # gpt-oss: <|end|> ends a message in the middle of an answer, and generation goes on.
    Habit(("<|return|>", "<|call|>", "<|end|>"), {"eot": "<|return|>", "eom": "<|call|>"}),
    Habit(("<|eot|>", "<|eom|>"), {"eot": "<|eot|>", "eom": "<|eom|>"}),  # Llama 4
    Habit(("<|im_end|>", "<|im_middle|>", "[EOS]"), {"eot": "<|im_end|>"}),  # Kimi K2
    Habit(("<|bos|>", "<|eos|>", "<|extra_0|>"), {"bos": "<|bos|>"}),  # Hunyuan-A13B
    Habit(("<|endofassistant|>",), {"eot": "<|endofassistant|>"}),  # dots
    Habit(  # Gemma 4
        ("<turn|>", "<|tool_response>"),
        {"bos": "<bos>", "eot": "<turn|>"},
        visible=tuple(
            '<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'.split()
        ),
        bos=True,
    ),
)


def habit(lookup: Lookup) -> Habit:
    """The habit of the family that a vocabulary belongs to; an empty one for most."""
    known = (h for h in HABITS if all(lookup(mark) is not None for mark in h.marks))
    return next(known, Habit((), {}))


@dataclass(frozen=True, slots=True)
class Special:
    """What llama.cpp is told about special tokens.

    ids:       role (bos, eos, eot, eom, unknown, padding) to id.
    tokens:    the vocabulary's entries, their kinds put right.
    named_bos: the folder itself says which token is BOS.
    """

    ids: Mapping[str, int]
    tokens: list[Entry]
    add_bos: bool
    add_eos: bool
    named_bos: bool
    notes: tuple[str, ...]


def special(source: Source, settings: Settings) -> Special:
    """The roles of a vocabulary's tokens and what goes around a text."""
    owner = {text: i for i, (text, _) in enumerate(source.tokens)}
    lookup = owner.get
    usual = habit(lookup)
    named = bool(_candidates("bos", source, settings, lookup))
    ids, ends, notes = _roles(source, settings, usual, lookup)
    around = added_around(source, settings, usual, lookup, ids)
    visible = {token for text in usual.visible if (token := lookup(text)) is not None}
    tokens = list(source.tokens)
    for i in visible.union(i for i in ends if i < len(tokens)):
        if tokens[i][1] in (Kind.CONTROL, Kind.USER_DEFINED):
            # What ends a turn is no part of the answer.
            tokens[i] = (tokens[i][0], Kind.USER_DEFINED if i in visible else Kind.CONTROL)
    stolen = stolen_words(text for text, kind in tokens if kind == Kind.NORMAL)
    return Special(
        ids={**ids, **around.ids},
        tokens=tokens,
        add_bos=around.bos,
        add_eos=around.eos,
        named_bos=named or around.bos,
        notes=(*notes, *around.notes, *stolen),
    )


def _roles(
    source: Source, settings: Settings, usual: Habit, lookup: Lookup
) -> tuple[dict[str, int], list[int], list[str]]:
    """Ids of the roles, every id that ends a text, and notes.

    The tokenizer's own files win over the family's habit, that over generation_config.json, and that over
    config.json. Raises TokenizerError when nothing ends a text: llama.cpp would then take id 11 (or 2).
    """
    habits = {role: token for role, text in usual.roles.items() if (token := lookup(text)) is not None}
    ids: dict[str, int] = {}
    for role, name in {"bos": "bos", "unknown": "unk", "padding": "pad"}.items():
        own = _named(name, settings, lookup)
        found = own or [habits[role]] if role in habits else _candidates(name, source, settings, lookup)
        if found:
            ids[role] = found[0]
    ends = _candidates("eos", source, settings, lookup)
    if not ends:
        raise TokenizerError(
            "no end-of-sequence token; expected eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    ids["eos"] = ends[0]
    ids |= {role: habits[role] for role in ("eot", "eom") if role in habits}

    def text_of(token: int) -> str:
        return source.tokens[token][0] if token < len(source.tokens) else f"[PAD{token}]"

    if "eot" not in ids and (turn := [i for i in ends if text_of(i) in _ENDS_A_TURN] or ends[1:]):
        ids["eot"] = turn[0]
    rest = [i for i in ends if i not in ids.values() and text_of(i) not in _ALWAYS_END]
    message = lookup("<|eom_id|>")
    if "eom" not in ids and message is not None:
        ids["eom"] = message
    elif "eom" not in ids and rest:
        ids["eom"] = rest.pop(0)
    return (
        ids,
        ends,
        [
            f"llama.cpp does not stop at {text_of(i)!r} (id {i}), which generation_config.json lists"
            for i in rest
        ],
    )


def _candidates(name: str, source: Source, settings: Settings, lookup: Lookup) -> list[int]:
    """Every id the folder gives for bos, eos, unk or pad, the most binding first, none twice."""
    role = {"unk": "unknown", "pad": "padding"}.get(name, name)
    fixed = lookup(source.roles[role]) if role in source.roles else None
    found = [*_named(name, settings, lookup), *([] if fixed is None else [fixed])]
    return list(dict.fromkeys([*found, *_numbered(name, settings)]))


def _named(name: str, settings: Settings, lookup: Lookup) -> list[int]:
    """Ids of the texts that the tokenizer's files give for bos, eos, unk or pad."""
    found = []
    for file in (settings.tokenizer, settings.special_map):
        text = file.token(f"{name}_token")
        token = None if text is None else lookup(text)
        if text is not None and token is None and name in ("bos", "eos"):
            raise TokenizerError(
                f"{file.file}: {name}_token {text!r} is not in the vocabulary; expected one of its tokens"
            )
        found += [] if token is None else [token]
    return found


def _numbered(name: str, settings: Settings) -> list[int]:
    """The ids that the model's files give."""
    files = (settings.generation, settings.model, settings.inner_model)
    return [token for file in files for token in file.ids(f"{name}_token_id")]


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
    source: Source, settings: Settings, usual: Habit, lookup: Lookup, ids: Mapping[str, int]
) -> Added:
    """What llama.cpp should add around a text.

    tokenizer.json's post-processor is what Hugging Face runs (transformers 5 reads nothing else when the file
    exists). One exception: `add_bos_token: true` in tokenizer_config.json without such a post-processor, as
    in DeepSeek-V3, was obeyed by transformers 4 and is how those models were trained, so it is obeyed here.
    """
    notes: list[str] = []
    out: dict[str, int] = {}
    adds: dict[str, bool] = {}
    for role, tokens in zip(("bos", "eos"), frame(source.post_processor), strict=True):
        wanted = settings.tokenizer.flag(f"add_{role}_token")
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
        elif role in ids and source.adds_bos:
            adds[role] = role == "bos" if wanted is None else wanted
        elif role in ids and (wanted or (wanted is None and role == "bos" and usual.bos)):
            adds[role] = True
            why = f"add_{role}_token is true" if wanted else "this family begins texts with it"
            notes.append(f"{why} though tokenizer.json's post-processor adds none; it is added")
    return Added(bos=adds["bos"], eos=adds["eos"], ids=out, notes=tuple(notes))
