"""What a conversion may be told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moequant.containers.folders.plan import FolderSettings
from moequant.containers.gguf.sizes import Budget, parse_size
from moequant.errors import PlanError
from moequant.formats import Effort
from moequant.forward.resources import Resources
from moequant.ranks import here
from moequant.statistics.importance import Gating

FormatName = Literal["gguf", "safetensors", "gptq", "awq"]

PRESET = "Q4_K_M"
"""The size of a GGUF file when nobody says."""

SIZES = ("type", "size", "bpw")
"""Each may name several sizes, separated by commas: a file for each."""

_OF_FILES = (*SIZES, "plan")

_ONLY_OF_FILES = (*_OF_FILES, "tensor_type", "card")
_OF_FOLDERS = ("scheme", "bits", "group_size", "quantize_attention", "tp", "schemes", "gpu")
_OF_ONE_SCHEME = ("scheme", "bits", "group_size", "quantize_attention")
_OF_BUDGETS = ("schemes", "gpu")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to convert a model. The defaults are the recommendation.

    `format` chooses a GGUF file or a folder.

    The size of a file is given by one of `type` (a preset), `size` (bytes, as people write them), `bpw` or
    `plan` (a plan's JSON). All but `plan` may name several, with commas between them; `convert_all` writes
    them all. `tensor_type` pins types, each `REGEX=TYPE`. `split_size` is the most bytes of weights in one
    file of the output.

    The size of a folder is given by `scheme` (or `bits`) and `group_size`, or by `size`, or by `plan`. `tp`
    is how many GPUs will share each weight.

    `calib` and `eval` are texts: a file, a folder, a .jsonl file or a dataset; None is the bundled text. With
    `eval_tokens` 0 nothing is compared. `stats` (of `moequant route`) or `imatrix` (of llama-imatrix) replace
    the statistics pass.

    Written beside the output: `imatrix_out`, an imatrix; `card`, a README.md, or a folder to put it in;
    `html`, a page about the conversion.

    `self_check` compares our reading of the folder with transformers'. `coupled` rounds each layer so that it
    makes up for the rounding of the layers before it. `mtp` keeps the layers that predict the token after the
    next. `gating` "gate2" counts a token by the square of the router's weight, "none" counts all alike.

    A conversion with the settings of a killed one to the same output continues it; with `fresh` it begins
    again. `ram` is the memory to use, in bytes. `stream` is how many bytes of a model of the Hub may be on
    disk at a time; None downloads it whole.

    PlanError for an option that the format does not have, and for two that contradict each other.
    """

    type: str | None = None
    calib: str | Path | None = None
    calib_tokens: int = 131_072
    eval: str | Path | None = None
    eval_tokens: int = 16_384
    effort: Effort = "default"
    gating: Gating = "gate2"
    seed: int = 0
    size: str | None = None
    bpw: float | str | None = None
    plan: Path | None = None
    tensor_type: tuple[str, ...] = ()
    coupled: bool = True
    stats: Path | None = None
    imatrix: Path | None = None
    imatrix_out: Path | None = None
    card: Path | None = None
    html: Path | None = None
    ram: int | None = None
    stream: int | None = None
    device: str = "cpu"
    overwrite: bool = False
    fresh: bool = False
    format: FormatName = "gguf"
    scheme: str | None = None
    bits: int | None = None
    group_size: int | None = None
    split_size: str | None = None
    quantize_attention: bool | None = None
    tp: int | None = None
    schemes: str | None = None
    gpu: float | None = None
    self_check: bool = True
    mtp: bool = True

    def __post_init__(self) -> None:
        """See the class."""
        # A folder may have a size as well: schemes are then chosen.
        in_folders = ("size", "plan") if self.format == "safetensors" else ()
        only_files = [name for name in _ONLY_OF_FILES if name not in in_folders]
        foreign = _OF_FOLDERS if self.format == "gguf" else only_files
        if given := [name for name in foreign if getattr(self, name) not in (None, ())]:
            own = _OF_FILES if self.format == "gguf" else (*in_folders, *_OF_FOLDERS)
            if given[0] == "card":
                raise PlanError(
                    "--card does not go with a folder, which gets its README.md without it; leave --card out"
                )
            raise PlanError(
                f"{_option(given[0])} does not go with --format {self.format}, whose own options are "
                f"{', '.join(map(_option, own))}"
            )
        if self.format != "gguf":
            self._check_folder()
        _ = self.resources, self.split
        if self.format == "gguf":
            sizes = [name for name in _OF_FILES if getattr(self, name) is not None]
            if len(sizes) > 1:
                raise PlanError(
                    f"{' and '.join(map(_option, sizes))} each say how large the file is; give one of them"
                )
            if self.plan is None:
                labels = [each.budget.label for each in self.each]
                if twice := [label for label in labels if labels.count(label) > 1]:
                    raise PlanError(f"{twice[0]}: is named twice; name every size once")
        if self.plan is not None and self.tensor_type:
            raise PlanError(f"--tensor-type does not go with --plan; write the types into {self.plan}")
        if self.stats is not None and self.imatrix is not None:
            raise PlanError(
                f"{self.stats}, {self.imatrix}: two sources of statistics; give one of --stats and --imatrix"
            )

    def _check_folder(self) -> None:
        """PlanError for options of a folder that say the same thing, or nothing together, and for a scheme
        that its layout does not hold."""
        by = next((name for name in ("plan", "size") if getattr(self, name) is not None), None)
        apart = {"plan": ("size", *_OF_ONE_SCHEME, *_OF_BUDGETS), "size": _OF_ONE_SCHEME}.get(
            str(by), _OF_BUDGETS
        )
        given = [name for name in apart if getattr(self, name) is not None]
        if given and by is None:
            raise PlanError(
                f"{_option(given[0])} is for a folder with --size; add it, or name one with --scheme"
            )
        if given:
            raise PlanError(f"{_option(given[0])}: --{by} chooses schemes itself; leave one of them out")
        if by is None:
            _ = self.folder.wanted

    @property
    def each(self) -> tuple[Settings, ...]:
        """Settings for each size that is named, in that order."""
        for name in SIZES:
            value = getattr(self, name)
            if isinstance(value, str) and "," in value:
                parts: list[dict[str, Any]] = [{name: part.strip()} for part in value.split(",")]
                return tuple(replace(self, **part) for part in parts)
        return (self,)

    @property
    def label(self) -> str:
        """What the size is called in a file's name."""
        return self.budget.label if self.plan is None else self.plan.stem

    @property
    def budget(self) -> Budget:
        """The one size of a file or folder that was asked for; PlanError for what is none."""
        if self.size is not None:
            return Budget.of_size(self.size)
        return (
            Budget.of_bpw(self.bpw)
            if self.bpw is not None
            else Budget.of_preset(PRESET if self.type is None else self.type)
        )

    @property
    def folder(self) -> FolderSettings:
        """What was asked for of a folder."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _OF_FOLDERS}
        given["shard_bytes"] = self.split
        known = {name: value for name, value in given.items() if value is not None}
        if self.format in ("gptq", "awq"):
            return FolderSettings(self.format, **known)
        return FolderSettings(**known)

    @property
    def split(self) -> int | None:
        """Bytes of `split_size`; PlanError for what is no size."""
        return None if self.split_size is None else parse_size(self.split_size)

    @property
    def inputs(self) -> tuple[str | Path | None, ...]:
        """What is read beside the model."""
        return (self.calib, self.eval, self.plan, self.stats, self.imatrix)

    @property
    def resources(self) -> Resources:
        """What passes over the model may use."""
        return Resources(ram=self.ram, device=self.device, ranks=here())


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
