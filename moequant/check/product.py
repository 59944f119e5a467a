"""The product under check: Triton's kernels where they run, else decode and multiply in torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.errors import VerifyError
from moequant.forward.resources import Resources
from moequant.kernels import KERNEL_FORMATS, Matrix

Multiply = Callable[[Tensor, Matrix, Tensor], Tensor]
"""(x f32 [n, in], matrix (E, out, in), experts i64 [n]) -> f32 [n, out]: each row times its own expert."""

IN_TORCH = "decode, then multiply in torch"

NO_KERNEL = "no kernel: decode, then multiply in torch"
"""Of numbers that no kernel of moequant takes."""


@dataclass(frozen=True, slots=True)
class Product:
    """How rows are multiplied, and what to call it."""

    name: str
    device: str
    kernels: bool

    def of(self, matrix: Matrix, rows: int) -> tuple[str, Multiply]:
        """What multiplies that many rows by a matrix here, and what to call it, arithmetic included."""
        if not self.kernels or matrix.format not in KERNEL_FORMATS:
            return IN_TORCH, self._in_torch
        from moequant.kernels.matmul import arithmetic  # imports Triton

        return f"{self.name}, {arithmetic(matrix, rows, 1)}", self._by_kernel

    def _by_kernel(self, x: Tensor, matrix: Matrix, experts: Tensor) -> Tensor:
        from moequant.kernels.matmul import grouped_matmul  # imports Triton

        on = self.device
        out = grouped_matmul(x.to(on), matrix.to(on), experts[:, None].to(on))[:, 0].cpu()
        return out if matrix.factors is None else out * matrix.factors[experts, None]

    def _in_torch(self, x: Tensor, matrix: Matrix, experts: Tensor) -> Tensor:
        packed = matrix.to(self.device)
        return self._each(
            x, experts, matrix.shape[1], lambda expert: packed.experts(expert, expert + 1).decode()[0]
        )

    def of_values(self, x: Tensor, decoded: Tensor, experts: Tensor) -> Tensor:
        """The same product of decoded weights f32 [E, out, in]: where there is no kernel."""
        return self._each(x, experts, decoded.shape[1], lambda expert: decoded[expert].to(self.device))

    def _each(self, x: Tensor, experts: Tensor, n_out: int, weights: Callable[[int], Tensor]) -> Tensor:
        """Each row times the weights of its expert, by torch."""
        x = x.to(self.device)
        out = torch.empty(len(x), n_out, device=self.device)
        for expert in sorted(set(experts.tolist())):
            rows = (experts == expert).to(self.device)
            out[rows] = x[rows] @ weights(expert).T
        return out.cpu()


def choose(device: str | None) -> tuple[Product, tuple[str, ...]]:
    """The product on that device (None: a GPU when there is one), and notes on what that leaves unchecked.
    "interpreter" is Triton's; kernels run on "cuda" alone, and elsewhere torch multiplies.

    VerifyError or PlanError when the device is asked for and not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise VerifyError("--device cuda: torch finds no CUDA device; leave it out to check on the CPU")
        return Product(f"Triton kernels on {torch.cuda.get_device_name()}", "cuda", True), ()
    if device == "interpreter":
        _need_interpreter()
        return Product("Triton kernels in its interpreter", "cpu", True), ()
    note = "no CUDA device is used: the GPU kernels did not run; products are decoded and multiplied in torch"
    return Product(IN_TORCH, Resources(device=device).device, False), (note,)


def _need_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        raise VerifyError("--device interpreter: triton is not installed; pip install triton")
    from triton import knobs  # type: ignore[import-untyped]

    if not knobs.runtime.interpret:
        raise VerifyError("--device interpreter: set TRITON_INTERPRET=1 before moequant starts")
