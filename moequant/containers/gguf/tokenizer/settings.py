"""The JSON files of a model folder that speak of tokens, read with checks, and chat templates."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moequant.checkpoint.folder import belongs
from moequant.errors import TokenizerError

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True, slots=True)
class Section:
    """One JSON object and the name of its file. Every reader raises TokenizerError naming the key."""

    file: str
    values: Mapping[str, Any]

    def text(self, key: str) -> str | None:
        """A text, None when it is absent or null."""
        value = self.values.get(key)
        return None if value is None else self._checked_text(key, value)

    def token(self, key: str) -> str | None:
        """The text of a token, which may be the `content` of an object."""
        value = self.values.get(key)
        if isinstance(value, dict):
            return self._checked_text(f"{key}.content", value.get("content"))
        return self.text(key)

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def ids(self, key: str) -> list[int]:
        """Token ids, given as one or as a list; negative ones stand for none."""
        value = self.values.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise self.wrong(key, value, "a token id or a list of them")
        return [v for v in values if v >= 0]

    def section(self, key: str) -> "Section":
        """An object within, empty when it is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Section(f"{self.file}: {_printable(key)}", value or {})

    def added_tokens(self) -> dict[int, AddedToken]:
        """What `added_tokens_decoder` lists, by id."""
        inner = self.section("added_tokens_decoder")
        found = {}
        for key in inner.values:
            entry = inner.section(key)
            content = entry.text("content")
            if not key.isdecimal() or not content:
                raise inner.wrong(key, entry.values, 'an id and an object with "content"')
            found[int(key)] = AddedToken(content, **{flag: bool(entry.flag(flag)) for flag in _FLAGS})
        return found

    def wrong(self, key: str, value: object, expected: str) -> TokenizerError:
        shown = repr(value)
        shown = shown if len(shown) < 80 else f"{shown[:76]} …"
        return TokenizerError(f"{self.file}: {_printable(key)} is {shown}; expected {expected}")

    def _checked_text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(key, value, "a text of whole characters") from None
        return value


def _printable(key: str) -> str:
    return key if key.isprintable() else repr(key)


@dataclass(frozen=True, slots=True)
class Settings:
    """The files beside the vocabulary; absent ones are empty."""

    tokenizer: Section
    special_map: Section
    generation: Section
    model: Section
    inner_model: Section
    """Multimodal configs keep the language model's ids one level down."""


def read_settings(folder: Path) -> Settings:
    model = _section(folder, "config.json")
    return Settings(
        tokenizer=_section(folder, "tokenizer_config.json"),
        special_map=_section(folder, "special_tokens_map.json"),
        generation=_section(folder, "generation_config.json"),
        model=model,
        inner_model=model.section("text_config"),
    )


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; TokenizerError when it is missing (unless optional) or not an object."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path}: expected readable JSON, got {error}; is the download complete?"
        ) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _section(folder: Path, name: str) -> Section:
    return Section(name, read_json(folder / name, optional=True))


def chat_templates(folder: Path, settings: Settings) -> tuple[tuple[str, str], ...]:
    """(name, template) pairs, "default" first; template files win over tokenizer_config.json."""
    inline = settings.tokenizer
    if inline.values.get("chat_template") is None:
        inline = _section(folder, "chat_template.json")
    templates = _inline_templates(inline)
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for path in files:
        if path.is_file():
            if not belongs(path, folder):
                raise TokenizerError(
                    f"{path}: leads out of the model folder, and would be published; copy the file into it"
                )
            name = "default" if path is files[0] else path.stem
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise TokenizerError(f"{path}: expected readable UTF-8, got {error}") from error
    return tuple(sorted(templates.items(), key=lambda item: (item[0] != "default", item[0])))


def _inline_templates(section: Section) -> dict[str, str]:
    """Templates by name; one that is not named is the default one."""
    found = section.values.get("chat_template")
    if isinstance(found, list):
        entries = [
            Section(section.file, {"chat_template": entry}).section("chat_template") for entry in found
        ]
        pairs = [(entry.text("name"), entry.text("template")) for entry in entries]
    elif isinstance(found, dict):
        pairs = [(name, section.section("chat_template").text(name)) for name in found]
    else:
        pairs = [] if found is None else [("default", section.text("chat_template"))]
    templates = {name: text for name, text in pairs if name is not None and text is not None}
    if len(templates) != len(pairs):
        raise section.wrong("chat_template", found, "every template with a name of its own")
    return templates
