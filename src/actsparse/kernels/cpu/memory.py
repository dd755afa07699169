"""Weights on huge pages, and what the memory can deliver."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from .loading import library, missing


def use_huge_pages(*tensors: Tensor | None) -> int:
    """Move weights onto 2 MiB pages; returns how many of their bytes lie on such pages then.

    Rows scattered over 4 KiB pages each miss the TLB, which costs up to a third of the bandwidth at low densities. Values,
    addresses and memory use do not change, and a second call finds the work done. Linux 6.1 or newer moves ordinary memory;
    anything else (a file's mapping, whose pages are the page cache's, other devices, under 2 MiB) is left alone and counts
    0. It never fails.
    """
    if missing:
        return 0
    moved = 0
    for tensor in tensors:
        # Contiguous in either order: then the bytes from its address on are all its own.
        if tensor is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.dim() != 2:
            continue
        if tensor.is_contiguous() or tensor.t().is_contiguous():
            moved += int(library().as_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    return moved


class ReadTest:
    """The machine's read bandwidth: plain reads of one buffer far larger than any cache, on all torch threads."""

    def __init__(self, bytes: int = 512 << 20) -> None:
        # Real data: untouched pages would all map to one zero page and read from cache.
        self._data = torch.arange(bytes // 8, dtype=torch.int64, device="cpu")
        # The weights that this is the ceiling for lie on such pages too; it makes 4 to 6 % of the rate.
        library().as_huge_pages(self._data.data_ptr(), self._data.nbytes)
        self.gb_s()

    def gb_s(self) -> float:
        """GB/s of one read."""
        size = self._data.nbytes
        start = time.perf_counter()
        library().as_read(self._data.data_ptr(), size)
        return size / (time.perf_counter() - start) / 1e9


def read_bandwidth(repeats: int = 7) -> tuple[float, float, float]:
    """Median, least and greatest GB/s over ``repeats`` reads of a :class:`ReadTest`."""
    test = ReadTest()
    rates = [test.gb_s() for _ in range(repeats)]
    return statistics.median(rates), min(rates), max(rates)
