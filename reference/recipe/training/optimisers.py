"""Muon for the matrices, and the controller of the penalty that makes the gates sparse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def orthogonal(g: Tensor) -> Tensor:
    """Newton-Schulz iterations (quintic) towards the nearest semi-orthogonal matrices, over a stack of matrices."""
    x = g.to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):  # fmt: skip
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.float()


class Muon:
    """Muon over stacks of equally shaped matrices, with updates of AdamW's size and decoupled weight decay."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.1) -> None:
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for weight in matrices:
            groups.setdefault((min(weight.shape), max(weight.shape)), []).append(weight)
        self.groups = list(groups.values())
        self.buffers = [
            torch.zeros(len(g), min(g[0].shape), max(g[0].shape), device=g[0].device) for g in self.groups
        ]  # fmt: skip
        self.momentum, self.decay = momentum, decay
        self.orthogonal = orthogonal

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([w.grad if w.shape[0] <= w.shape[1] else w.grad.mT for w in group])
            buffer.lerp_(grads, 1 - self.momentum)
            update = self.orthogonal(grads.lerp(buffer, self.momentum))
            size = 0.2 * math.sqrt(buffer.shape[-1])
            flat = [u if w.shape[0] <= w.shape[1] else u.mT for w, u in zip(group, update.unbind(), strict=True)]
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, flat, alpha=-rate * size)


class Controller:
    """Penalty weights by layer that keep each layer's share of zeros on a target (proportional and integral)."""

    def __init__(self, layers: int, goal: float, device: torch.device) -> None:
        self.goal, self.gain = goal, 1000.0
        self.start: Tensor | None = None
        self.level = torch.full((layers,), math.log(1e-3), device=device)
        self.smooth = torch.zeros(layers, device=device)
        self.weights = torch.zeros(layers, device=device)
        self.steps = 0

    def update(self, zeros: Tensor, progress: float, pace: float) -> None:
        """Take one measurement. ``pace`` is the share of the run that a step takes."""
        self.smooth = zeros if self.steps == 0 else self.smooth.lerp(zeros, 0.1)
        self.steps += 1
        if progress < 0.03:
            return
        if self.start is None:
            self.start = self.smooth.clone()
        share = min((progress - 0.03) / 0.42, 1.0)
        target = self.start + (self.goal - self.start) * (1 - (1 - share) ** 2)
        error = target - self.smooth
        # Integral gain by share of the run: an error of 0.05 changes the weight by e in 2 % of the run.
        self.level = (self.level + min(self.gain * pace, 0.5) * error).clamp(-14.0, 4.0)
        self.weights = torch.exp(self.level + 8.0 * error)
