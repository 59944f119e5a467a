"""Tables of which a pass reads the rows that its tokens look up, and no others.

Such a table may be larger than all else in the model. Which rows they are, the model's own code says: it is
asked once, with a stand-in for the table that notes what it is asked for. Then the stream's table is one of
those rows alone, a weight like any other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers
from torch import Tensor, nn

from moequant.checkpoint import Checkpoint
from moequant.errors import ShortageError
from moequant.forward.memory import usable_bytes
from moequant.values import Weight


class _Noting(nn.Module):
    """Stands in for a table and gives nothing; `rows` are all that were asked for."""

    def __init__(self, width: int, device: torch.device | str) -> None:
        super().__init__()
        self.width, self.rows = width, torch.empty(0, dtype=torch.int64)
        self.weight = torch.empty(0, device=device)  # models ask it where it lies

    def forward(self, numbers: Tensor) -> Tensor:
        self.rows = torch.unique(torch.cat([self.rows, numbers.flatten().cpu()]))
        return torch.zeros((), device=numbers.device).expand(*numbers.shape, self.width)


class _Rows(nn.Module):
    """A table with some of its rows, under their numbers in the whole: `rows` i64 [n], rising."""

    def __init__(self, rows: Tensor, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(len(rows), width, device="meta"), requires_grad=False)

    def forward(self, numbers: Tensor) -> Tensor:
        return nn.functional.embedding(torch.searchsorted(self.rows, numbers.contiguous()), self.weight)


def looked_up(
    checkpoint: Checkpoint,
    model: transformers.PreTrainedModel,
    batches: Iterable[Tensor],
    device: str | torch.device,
    limit: int | None,
) -> Checkpoint:
    """The checkpoint with those rows alone of each table that batches of tokens look up, i64 [rows, n] each,
    on the device; `model`, still empty, has room for them.

    ShortageError where they take more than half of what may be used, `limit` bytes or what is free.
    """
    batches, found = list(batches), dict[str, Weight]()
    for weight in checkpoint.weights:
        if weight.is_table and weight.runs:
            found[weight.name] = _narrowed(model, weight, batches, device)
    usable = usable_bytes(limit, str(device))
    needed = 4 * sum(weight.numel for weight in found.values())
    if usable is not None and needed > usable // 2:
        tokens = sum(batch.numel() for batch in batches)
        raise ShortageError(
            f"{checkpoint.path}: what {tokens:,} tokens look up takes {needed / 1e9:.1f} GB, half "
            f"of {usable / 1e9:.1f} GB may be used; give fewer tokens (--calib-tokens, --eval-tokens)"
        )
    return checkpoint.with_weights(tuple(found.get(weight.name, weight) for weight in checkpoint.weights))


def _narrowed(
    model: transformers.PreTrainedModel, weight: Weight, batches: list[Tensor], device: str | torch.device
) -> Weight:
    """The table with the rows that are looked up; the model has a table of so many in its place."""
    path = weight.place.param.removesuffix(".weight")
    noting = _Noting(weight.n_in, device)
    model.set_submodule(path, noting)
    owner = model.get_submodule(path.rpartition(".")[0])
    with torch.inference_mode():
        for batch in batches:
            owner(batch.to(device), None)  # tokens, and no cache
    model.set_submodule(path, _Rows(noting.rows.to(device), weight.n_in))
    return weight.at(tuple(noting.rows.tolist()))
