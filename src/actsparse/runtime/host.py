"""Feed-forward weights of a model on a GPU that stay in the host's memory.

Text needs every matrix once a forward: they pass through two places on the card, in the order in which they were taken in;
while one is multiplied, a second stream fills the other.  Decoding needs the rows and columns of chosen neurons, which are
gathered once a prompt: the card reads them where they lie, in pinned memory.

On a device that is not CUDA's nothing is pinned, and copies wait for each other: the same values, in the same order.

Shape letters: O outputs, I inputs, N neurons, H hidden, n chosen neurons.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from actsparse.models.sites import ModelError


class HostWeights:
    """The feed-forward matrices of some layers, in the host's memory, and two places on the card.

    Args:
        card: where the rest of the model is.
    """

    def __init__(self, card: torch.device) -> None:
        self.card = card
        self._matrices: list[torch.Tensor] = []
        self._at: dict[int, int] = {}
        self._places: list[_Place] = []
        self._stream = torch.cuda.Stream(card) if card.type == "cuda" else None
        self._pinned: list[int] = []
        # Two threads that read texts at once take turns, matrix by matrix.
        self._lock = threading.Lock()
        if card.type == "cuda":
            weakref.finalize(self, _unpin, self._pinned, card)

    def take_in(self, weight: torch.Tensor, *, columns: bool = False) -> torch.Tensor:
        """A copy of a weight [O, I] in the host's memory (pinned, for CUDA), with its ``columns`` contiguous if wanted.

        Raises:
            ModelError: the system does not let so much memory be pinned.
        """
        # Turned on the card, which is faster; written to fresh huge pages, which take a tenth of the time of small ones.
        turned = weight.to(self.card).t().contiguous() if columns else weight
        memory = mmap.mmap(-1, turned.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        stored = torch.frombuffer(memory, dtype=weight.dtype).view(turned.shape)
        stored.copy_(turned)
        if self.card.type == "cuda":
            result = int(torch.cuda.cudart().cudaHostRegister(stored.data_ptr(), stored.nbytes, 0))
            if result:
                raise ModelError(
                    f"{stored.nbytes / 1e9:.2f} GB of the host's memory cannot be pinned after {self.nbytes / 1e9:.2f} GB "
                    f"(CUDA error {result}): low memory on a GPU keeps feed-forward weights there"
                )
            self._pinned.append(stored.data_ptr())
        self._at[stored.data_ptr()] = len(self._matrices)
        self._matrices.append(stored)
        return stored.t() if columns else stored

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is one of those that were taken in."""
        return weight.device.type == "cpu" and weight.data_ptr() in self._at

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(matrix.nbytes for matrix in self._matrices)

    @contextmanager
    def on_card(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """``weight``, one of those taken in, on the card for as long as the block lasts, in its own layout."""
        with self._lock:
            at = self._at[weight.data_ptr()]
            place = self._bring(at)
            if self._stream is not None:
                torch.cuda.current_stream(self.card).wait_event(place.filled)
            if at + 1 < len(self._matrices):
                self._bring(at + 1)
            stored = self._matrices[at]
            there = place.memory[: stored.numel()].view(stored.shape)
            try:
                yield there if weight.stride() == stored.stride() else there.t()
            finally:
                if self._stream is not None:
                    place.used.record(torch.cuda.current_stream(self.card))

    def gather(self, rows: torch.Tensor, index: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Chosen rows [n, H] on the card of a matrix [N, H] whose rows are contiguous (a weight, or the transpose of one).

        Args:
            rows: one of those taken in, seen by rows.
            index: int64 [n], on the card.
            into: takes the result, [n, H].
        """
        stored = self._matrices[self._at[rows.data_ptr()]]
        if self.card.type != "cuda":
            found = stored.index_select(0, index.to("cpu")).to(self.card)
            return found if into is None else into.copy_(found)
        if into is None:
            into = torch.empty(len(index), stored.shape[1], dtype=stored.dtype, device=self.card)
        torch.index_select(torch.as_tensor(_Seen(stored), device=self.card), 0, index, out=into.view(torch.uint8))
        return into

    def _bring(self, at: int) -> _Place:
        """The place that holds a matrix, or will when its copy has ended."""
        if not self._places:
            size, dtype = max(matrix.numel() for matrix in self._matrices), self._matrices[0].dtype
            self._places = [_Place(torch.empty(size, dtype=dtype, device=self.card)) for _ in range(2)]
            if self._stream is not None:  # what had this memory before may still be under way
                self._stream.wait_stream(torch.cuda.current_stream(self.card))
        place = self._places[at % 2]
        if place.holds != at:
            place.holds = at
            stored = self._matrices[at].view(-1)
            if self._stream is None:
                place.memory[: stored.numel()].copy_(stored)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(place.used)
                    place.memory[: stored.numel()].copy_(stored, non_blocking=True)
                    place.filled.record(self._stream)
        return place


class _Place:
    """Memory on the card for one matrix; which one it holds, and when it was filled and last used."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.holds = -1
        if memory.is_cuda:
            self.filled, self.used = torch.cuda.Event(), torch.cuda.Event()


class _Seen:
    """A pinned matrix as the card sees it, for ``torch.as_tensor``: bytes, under unified addressing at the same address."""

    def __init__(self, stored: torch.Tensor) -> None:
        self._stored = stored
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (stored.shape[0], stored.shape[1] * stored.element_size()),
            "typestr": "|u1",
            "data": (stored.data_ptr(), False),
        }


def _unpin(addresses: list[int], card: torch.device) -> None:
    torch.cuda.synchronize(card)
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
