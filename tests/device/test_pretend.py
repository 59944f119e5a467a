"""The device refuses what CUDA refuses, and computes what the CPU computes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from tests.device.pretend import Mixed, Pretend, register, waits

DEVICE = register()


def test_tensors_come_and_go() -> None:
    x = torch.arange(6.0).view(2, 3)
    there = x.to(DEVICE)
    assert isinstance(there, Pretend) and there.device.type == DEVICE and there.cpu().device.type == "cpu"
    assert torch.equal(there.cpu(), x) and there.tolist() == x.tolist() and float(there[1, 2]) == 5
    for made in (
        torch.zeros(2, device=DEVICE),
        torch.tensor([1.0, 2.0], device=DEVICE),
        torch.arange(3, device=DEVICE),
        torch.eye(2, device=DEVICE),
        torch.full((2,), 3.0, device=DEVICE),
        there.new_ones(2),
        torch.empty_like(x, device=DEVICE),
        torch.linspace(0, 1, 3, device=DEVICE),
    ):
        assert made.device.type == DEVICE and made.cpu().device.type == "cpu"
    assert torch.eye(2, device=DEVICE).tolist() == [[1, 0], [0, 1]]
    assert torch.tensor([1.0, 2.0], device=DEVICE).tolist() == [1, 2]


def test_devices_do_not_mix() -> None:
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=DEVICE)
    for mixed in (
        lambda: here + there,
        lambda: here @ there,
        lambda: there.addmm_(here, there),
        lambda: torch.cat([here, there]),
        lambda: here[torch.tensor([0, 1], device=DEVICE)],
        lambda: there.index_put_((torch.tensor([0]),), here[:1]),
        lambda: here.index_add_(0, torch.tensor([0, 1], device=DEVICE), here),
        lambda: torch.where(there > 0, here, there),
        lambda: torch.zeros(()).add_(there.sum()),
        lambda: here[0, 0].add_(there[0, 0]),
        lambda: torch.stack([torch.tensor(1.0), there.sum()]),
    ):
        with pytest.raises(Mixed, match="same device"):
            mixed()
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        there.numpy()
    with pytest.raises((TypeError, RuntimeError)):
        np.asarray(there)
    with pytest.raises(Mixed, match="generator"):
        there.uniform_(generator=torch.Generator())
    with pytest.raises(Mixed, match="int64"):
        there.long() @ there.long()
    assert there[torch.tensor([1])].tolist() == [[1, 1]], "CUDA takes indices of the CPU"
    assert (there * torch.tensor(2.0)).tolist() == [[2, 2], [2, 2]], "single numbers may come from the CPU"
    here.copy_(there * 3)
    assert here.tolist() == [[3, 3], [3, 3]]


def test_views_and_writes_are_of_the_same_memory() -> None:
    x = torch.zeros(3, 4, device=DEVICE)
    x[1:, ::2] = 1
    x.t()[0].add_(torch.tensor([5.0, 0, 0], device=DEVICE))
    assert x.tolist() == [[5, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    x.data[0] = 0
    assert x.sum().item() == 4


def test_waits_are_counted() -> None:
    x = torch.arange(4.0, device=DEVICE)
    with waits() as found:
        assert x.sum() > 1 and x.tolist() and x.cpu() is not None
        x[x > 1].add_(x.to("cpu").to(DEVICE)[:2])
        x.mul_(2).clamp_(max=3)
    x.tolist()
    assert sorted(what for _, what in found.elements()) == [
        "_local_scalar_dense",
        "copy",
        "copy",
        "copy",
        "index",
        "tolist",
    ]


def test_modules_gradients_and_threads() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    expected = layer(x)
    expected.square().sum().backward()
    gradient = layer.weight.grad
    moved = nn.Linear(3, 2).to(DEVICE)
    with torch.no_grad():
        moved.weight.copy_(layer.weight)
        moved.bias.copy_(layer.bias)
    out = moved(x.to(DEVICE))
    out.square().sum().backward()
    assert torch.equal(out.cpu(), expected) and moved.weight.grad is not None and gradient is not None
    assert torch.equal(moved.weight.grad.cpu(), gradient)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            x + torch.zeros(5, 3, device=DEVICE)
        except Mixed as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised, "threads are watched too"
