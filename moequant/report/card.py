"""README.md for the Hugging Face Hub: what the files are, what they lost, how they were made and are run.

One generator for GGUF files and for folders. Nothing in it says where anything lies on this machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from moequant import __version__
from moequant.containers.about import front_matter, licenses
from moequant.containers.folders.plan import KEPT, FolderSettings, scheme_groups
from moequant.containers.folders.schemes import find
from moequant.escape import markdown, plain, shown, size, text_names, yaml
from moequant.files import atomic
from moequant.hub.publish import PLACEHOLDER
from moequant.report import figures
from moequant.report.conversion import Conversion
from moequant.report.summary import Report, estimate, kind
from moequant.text.bundled import LABELS

PICTURES = ("curve.png", "curve.svg")
"""Names under which a picture of the size/quality curve is looked for beside the card."""

DRAWN = "quality.png"
"""The picture that is drawn where there is none: size and KL divergence of the files that were measured."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the card tells. `imatrix` and `picture` are names of files beside it, if there are any."""

    made: Conversion
    imatrix: str | None = None
    picture: str | None = None

    @property
    def first(self) -> Report:
        """What all files share can be read from this one."""
        return self.made.reports[0]

    def text(self) -> str:
        """README.md with the front matter that the Hub reads."""
        parts = [self._front(), self._what(), self._files(), self._how(), self._running(), self._known()]
        return "\n".join(part for part in parts if part)

    def _front(self) -> str:
        checkpoint, folder = self.first.checkpoint, self.first.how.folder
        language = front_matter(checkpoint.path).get("language", [])
        languages = [language] if isinstance(language, str) else language
        tags = ["moequant", folder.layout if folder else "gguf", *(["moe"] if checkpoint.n_experts else [])]
        front = [
            *self._base(),
            *(f"{key}: {yaml(value)}" for key, value in licenses(checkpoint).items()),
            *(["language:", *(f"- {yaml(each)}" for each in languages)] if languages else []),
            f"library_name: {'transformers' if folder else 'gguf'}",
            f"pipeline_tag: {'text2text' if checkpoint.encodes else 'text'}-generation",
        ]
        return "\n".join(["---", *front, "tags:", *(f"- {tag}" for tag in tags), "---\n"])

    def _base(self) -> list[str]:
        """The model by its name on the Hub. A folder does not tell it: config and card name what the model
        itself was made from. So whoever publishes the files fills it in."""
        checkpoint = self.first.checkpoint
        if (named := checkpoint.hub_name) is not None:
            return [f"base_model: {yaml(named)}", "base_model_relation: quantized"]
        return [
            "# Put in the OWNER of the original model on the Hub, and take the two # away:",
            f"# base_model: {yaml(self._original())}",
            "# base_model_relation: quantized",
        ]

    def _original(self) -> str:
        """What the Hub calls the original, or a name that lacks its owner."""
        checkpoint = self.first.checkpoint
        return checkpoint.hub_name or f"OWNER/{checkpoint.name}"

    def _what(self) -> str:
        checkpoint, folder = self.first.checkpoint, self.first.how.folder
        name = markdown(checkpoint.name)
        if folder is not None:
            return f"# {name}, {kind(self.first)}\n\n{_schemes(self.first, folder)}"
        every = "Every expert is rounded under statistics of its own. " if checkpoint.n_experts else ""
        return (
            f"# {name}, GGUF\n\nFor llama.cpp and what is built on it, made by moequant {__version__} from "
            f"{self._source()}. {every}Router and norms stay F32.\n"
        )

    def _source(self) -> str:
        """The original, as a link where the Hub has it."""
        checkpoint = self.first.checkpoint
        text = markdown(checkpoint.repository)
        named = checkpoint.hub_name
        return text if named is None else f"[{text}](https://huggingface.co/{quote(named)})"

    def _files(self) -> str:
        """A row a file, with what it lost where that was measured."""
        reports = self.made.reports
        found = self.first.comparison
        columns = ["file", "size", "bits per weight"]
        columns += (
            ["perplexity", "KL divergence, mean", "KL divergence, 99 %", "same top token"] if found else []
        )
        rows = [columns, ["---"] * len(columns)]
        if found is not None:
            numel = sum(weight.numel for weight in self.first.checkpoint.weights)
            source = self.first.checkpoint.source_bytes
            before = estimate(found.base_perplexity, 3)
            rows.append(["the original", size(source), f"{8 * source / numel:.2f}", before, "", "", ""])
        for report in reports:
            name = "this folder" if report.how.folder else markdown(report.out.name)
            row = [name, size(report.file_bytes), f"{report.bits_per_weight:.2f}"]
            if (one := report.comparison) is not None:
                row += [estimate(one.perplexity, 3), estimate(one.kl_mean, 5), f"{one.kl_99:.4f}"]
                row += [f"{one.same_top:.2%}"]
            rows.append(row)
        text = "## Files\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
        if found is not None:
            text += (
                f"\nMeasured on {found.tokens:,} tokens of: {_named(found.source)}. Perplexity and KL "
                "divergence are defined as in llama-perplexity, and ± is the error of the mean.\n"
            )
        if self.picture is not None:
            text += f"\n![KL divergence by file size]({self.picture})\n"
        return text

    def _how(self) -> str:
        report = self.first
        text = f"## How it was made\n\nmoequant {__version__}. "
        calibration, rounded_on = report.calibration, report.how.rounded_on
        if rounded_on is not None:
            undoing = ", each layer towards undoing what the layers before it lost"
            towards = undoing if report.how.coupled else ""
            text += (
                f"Every expert was rounded under the Hessian of its own inputs{towards}. Calibration: "
                f"{rounded_on.tokens:,} tokens of: {_named(rounded_on.source)}.\n"
            )
        else:
            text += "`--effort fast`: a search of scales, then every weight to its nearest code. "
            text += (
                "No calibration text: all input channels count the same.\n"
                if calibration is None
                else "Errors are weighted by the inputs that each expert saw in "
                f"{calibration.tokens:,} tokens of: {_named(calibration.source)}.\n"
            )
        if self.imatrix is not None:
            text += f"\nThe statistics are in `{self.imatrix}`, an imatrix for llama-quantize.\n"
        return text

    def _running(self) -> str:
        """How each of the usual programs starts it; whoever uploads the files knows the name."""
        head = f"## How to run it\n\n`{PLACEHOLDER}` is where you found this page"
        more = "" if self.first.checkpoint.hub_name else "; `OWNER` is who published the original"
        head += f"{'' if self.first.how.folder else more}.\n\n"
        if self.first.checkpoint.encodes:
            return head + (
                "transformers loads it, with `pip install compressed-tensors`, and decodes the experts to "
                "their original precision in memory:\n\n"
                "```python\nfrom transformers import AutoModelForSeq2SeqLM\n\n"
                f'model = AutoModelForSeq2SeqLM.from_pretrained("{PLACEHOLDER}", dtype="auto")\n```\n'
            )
        if (folder := self.first.how.folder) is not None:
            text = head + f"```sh\nvllm serve {PLACEHOLDER}\n```\n"
            if folder.layout in ("gptq", "awq"):
                return text
            stored = [find(name) for name in scheme_groups(self.first.plan)]
            if len(stored) > 1 or not all(scheme.in_transformers for scheme in stored):
                return text + "\ntransformers 5.24 cannot load these experts.\n"
            package = "" if folder.layout == "mxfp4" else ", with `pip install compressed-tensors`"
            return text + (
                f"\ntransformers loads it too{package}; without a kernel for it, it decodes the experts to "
                "their original precision in memory.\n"
            )
        name = self.first.out.name
        return head + (
            "llama.cpp:\n\n"
            f"```sh\nllama-server --hf-repo {PLACEHOLDER} --hf-file {name}\n"
            f"llama-server -m {name}    # a file that you have downloaded\n```\n\n"
            f"ollama:\n\n```sh\nollama run hf.co/{PLACEHOLDER}:{name}\n```\n\n"
            f"LM Studio:\n\n```sh\nlms get https://huggingface.co/{PLACEHOLDER}\n```\n\n"
            "vLLM reads safetensors folders. This makes one of the same model, and starts it:\n\n"
            f"```sh\nmoequant convert {shlex.quote(plain(self._original()))} -o FOLDER "
            "--format safetensors\nvllm serve FOLDER\n```\n"
        )

    def _known(self) -> str:
        """What was skipped, and where the runtime or the tokenizer differs from the original."""
        notes = dict.fromkeys(note for report in self.made.reports for note in report.notes)
        return "## Good to know\n\n" + "".join(f"- {markdown(note)}\n" for note in notes) if notes else ""


def picture_path(card: Path, reports: int) -> Path | None:
    """Where a picture of several files is drawn; None where one lies already, or there is nothing to draw."""
    drawn = any((card.parent / name).is_file() for name in PICTURES)
    return None if drawn or reports < 2 else card.parent / DRAWN


def picture_for(made: Conversion, card: Path) -> Path | None:
    """The same for what was measured."""
    return picture_path(card, len(_measured(made.reports)))


def draw(made: Conversion, picture: Path) -> None:
    """Draw it. OutputError when the disk refuses."""
    figures.draw_sizes(_measured(made.reports), picture)


def _measured(reports: Sequence[Report]) -> list[figures.Point]:
    return [
        figures.Point(shown(report.out), report.file_bytes, report.comparison.kl_mean)
        for report in reports
        if report.comparison is not None
    ]


def text(made: Conversion, folder: Path, imatrix: Path | None = None) -> str:
    """The card for a place in `folder`, with the picture that lies there."""
    picture = next((name for name in (*PICTURES, DRAWN) if (folder / name).is_file()), None)
    beside = imatrix is not None and imatrix.parent.resolve() == folder.resolve()
    return Card(made, imatrix.name if imatrix is not None and beside else None, picture).text()


def write(text: str, path: Path, overwrite: bool = False) -> None:
    """The card into a file. OutputError when the disk refuses."""
    with atomic(path, overwrite) as partial:
        partial.write_text(text, encoding="utf-8")


def _schemes(report: Report, folder: FolderSettings) -> str:
    """Which weights of a folder are in which scheme, and which stay."""
    plan, numel = report.plan, {weight.name: weight.numel for weight in report.checkpoint.weights}
    kept = [choice for choice in plan.choices if choice.format in KEPT]
    named = list(scheme_groups(plan))
    rows = [(_words(name), [each for each in plan.choices if each.format == name]) for name in named]
    rows.append((f"{'/'.join(sorted({choice.format for choice in kept}))}, as in the original", kept))
    table = "".join(
        f"| {name} | {sum(numel[choice.weight] for choice in part):,} | "
        f"{size(sum(choice.bytes for choice in part))} |\n"
        for name, part in rows
    )
    experts = "Every expert" if report.checkpoint.n_experts else "The feed-forward blocks"
    also = " and attention" if folder.quantize_attention else ""
    return (
        f"{experts}{also} in {', '.join(named)}; router, norms, embedding and head in their original "
        f"precision. {report.bits_per_weight:.2f} bits a weight in all.\n\n"
        f"| stored as | weights | size |\n|---|---|---|\n{table}"
    )


def _words(name: str) -> str:
    """What a scheme stores, in words."""
    scheme = find(name)
    if scheme.kind != "integers":
        return f"{name}: {scheme.words}"
    group = "a whole row" if scheme.group == -1 else f"{scheme.group} weights"
    return f"{name}: {scheme.words}, one scale for {group}"


def _named(source: str) -> str:
    """A text by its name, not by where it lies; whoever reads the card does not know what is bundled."""
    ours = {label: f"moequant's {label}" for label in LABELS.values()}
    return markdown(text_names(", ".join(ours.get(each, each) for each in source.split(", "))))
