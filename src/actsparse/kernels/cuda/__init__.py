"""The CUDA kernels: CUDA C++ (``csrc/``) compiled at run time, launched through the driver.

Nothing here decides whether a call may run natively: that is :mod:`actsparse.kernels`' part.
"""

from .compiler import CudaError, device_obstacle, missing
from .launches import MAX_BATCH, ffn_obstacle, layout_obstacle
from .products import gated_ffn, linear

__all__ = [
    "MAX_BATCH", "CudaError", "device_obstacle", "ffn_obstacle", "gated_ffn", "layout_obstacle", "linear", "missing",
]  # fmt: skip
