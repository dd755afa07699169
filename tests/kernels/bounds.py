"""What the kernel tests share: stored layouts, thresholds, and how wrong float32 arithmetic may be.

Shape letters: B rows of activations, I in, O out, H hidden, N neurons, R rank, C channels, T tokens.

Tolerances follow from norms: a sum of n products in float32 is wrong by at most about n u |W||x| (u = 2^-24), and the
result is rounded once to the output type. Nothing is tuned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse import kernels
from actsparse.kernels import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = () if cpu.missing else kernels.available_isas()
U32 = 2.0**-24
# Any |w| and |x| here stay within a few units, so that float16 does not overflow.


def stored(weight: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """The logical [O, I] weight in a storage type and layout, at an address aligned to its element only."""
    weight = weight.to(dtype)
    source = weight if layout == "rows" else weight.T
    storage = torch.empty(source.numel() + 1, dtype=dtype)[1:].view(source.shape)
    storage.copy_(source)
    return storage if layout == "rows" else storage.T


def thresholds(size: int, density: float | str) -> Tensor:
    """0 keeps, huge drops: the kept set is exact whatever the values."""
    keep = torch.rand(size) < density if isinstance(density, float) else torch.zeros(size, dtype=torch.bool)
    if density == "one":
        keep[size // 2] = True
    return torch.where(keep, 0.0, 3e38)


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return expected.abs() * (info.eps / 2) + info.smallest_normal * info.eps


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (found.double() - expected).abs()
    worst = (error / bound).max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= bound).all()), f"error is {worst:.3g} times its bound"


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Error of the float32 sum, [.., O]; x and weight in float64."""
    scale = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return (x.shape[-1] + 4) * U32 * scale
