"""The model card of a quantized folder: README.md, what it is, how it was made, how to load it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moequant import __version__
from moequant.checkpoint import Checkpoint
from moequant.checkpoint.folder import belongs
from moequant.containers.base import Made
from moequant.containers.folders.plan import KEPT, FolderSettings, scheme_groups
from moequant.containers.folders.schemes import find
from moequant.escape import markdown, yaml

_LICENSE = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Card:
    """What the card tells of a folder, and of how it was made."""

    checkpoint: Checkpoint
    settings: FolderSettings
    made: Made

    def text(self) -> str:
        """README.md with the front matter that the Hub reads."""
        parts = [self._front(), self._what(), self._how()]
        if self.made.measured:
            rows = "\n".join(
                f"| {markdown(name)} | {markdown(value)} |" for name, value in self.made.measured
            )
            parts.append(f"## Measured\n\n| | |\n|---|---|\n{rows}\n")
        parts.append(self._loading())
        return "\n".join(parts)

    def _front(self) -> str:
        folder = self.checkpoint.path.resolve()
        front = [
            f"base_model: {yaml(self.checkpoint.repository)}",
            "base_model_relation: quantized",
            *_license(folder),
        ]
        tags = ["moequant", self.settings.layout, *(["moe"] if self.checkpoint.n_experts else [])]
        front += ["library_name: transformers", "pipeline_tag: text-generation"]
        return "\n".join(["---", *front, "tags:", *(f"- {tag}" for tag in tags), "---\n"])

    def _what(self) -> str:
        plan, numel = self.made.plan, {weight.name: weight.numel for weight in self.checkpoint.weights}
        kept = [c for c in plan.choices if c.format in KEPT]
        named = list(scheme_groups(plan))
        rows = [(_words(name), [c for c in plan.choices if c.format == name]) for name in named]
        rows.append((f"{'/'.join(sorted({c.format for c in kept}))}, as in the original", kept))
        table = "\n".join(
            f"| {name} | {sum(numel[c.weight] for c in part):,} | {sum(c.bytes for c in part) / 1e9:.3f} GB |"
            for name, part in rows
        )
        experts = "every expert" if self.checkpoint.n_experts else "the feed-forward blocks"
        also = " and attention" if self.settings.quantize_attention else ""
        title = named[0] if len(named) == 1 else "mixed precision"
        bits = 8 * plan.bytes / sum(numel.values())
        return (
            f"# {markdown(self.checkpoint.name)}, {title}\n\n"
            f"{experts[0].upper()}{experts[1:]}{also} in {', '.join(named)}; router, norms, "
            f"embedding and head in their original precision. {bits:.2f} bits a weight in all.\n\n"
            f"| stored as | weights | size |\n|---|---|---|\n{table}\n"
        )

    def _how(self) -> str:
        made = f"## How it was made\n\nmoequant {__version__}. "
        if self.made.rounded_on is not None:
            towards = (
                ", each layer towards undoing what the layers before it lost" if self.made.coupled else ""
            )
            return made + (
                f"Every expert was rounded under the Hessian of its own inputs{towards}. Calibration: "
                f"{self.made.rounded_on.tokens:,} tokens of: {markdown(self.made.rounded_on.source)}.\n"
            )
        made += "One scale search for every expert, every weight to its nearest code. "
        if self.made.calibration is None:
            return made + "No calibration text: all input channels count the same.\n"
        return made + (
            "Errors are weighted by the inputs that each expert saw in "
            f"{self.made.calibration.tokens:,} tokens of: {markdown(self.made.calibration.source)}.\n"
        )

    def _loading(self) -> str:
        text = "## Loading\n\n```sh\nvllm serve THIS_FOLDER\n```\n"
        if self.settings.layout == "gptq":
            return text
        return text + (
            "\ntransformers loads it too, with `pip install compressed-tensors`; it decodes the experts to "
            "their original precision in memory.\n"
        )


def _words(name: str) -> str:
    """What a scheme stores, in words."""
    scheme = find(name)
    if scheme.kind != "integers":
        return f"{name}: {scheme.words}"
    group = "a whole row" if scheme.group == -1 else f"{scheme.group} weights"
    return f"{name}: {scheme.words}, one scale for {group}"


def _license(folder: Path) -> list[str]:
    """The license lines of the original's card, if it has any."""
    card = folder / "README.md"
    if not belongs(card, folder):
        return []
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    return [f"{key}: {yaml(_unquoted(value.strip()))}" for key, value in _LICENSE.findall(parts[1])]


def _unquoted(value: str) -> str:
    """A YAML scalar without the quotes around it."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
