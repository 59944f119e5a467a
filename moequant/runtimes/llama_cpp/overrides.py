"""Which tensors llama.cpp keeps where: arguments of `--override-tensor`."""

from __future__ import annotations

from collections.abc import Iterable


def experts_on_cpu(layers: Iterable[int]) -> str:
    """The experts of these layers in system memory: the same names as `--n-cpu-moe` has."""
    return rf"blk\.({'|'.join(map(str, layers))})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
