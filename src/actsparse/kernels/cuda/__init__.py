"""The CUDA kernels: CUDA C++ (``csrc/``) compiled at run time, launched through the driver.

Nothing here decides whether a call may run natively: that is :mod:`actsparse.kernels`' part.
"""

from . import cores, decoder, graded, many
from .compiler import DTYPES, CudaError, architecture, device_obstacle, driver_version, missing
from .obstacles import ffn_obstacle, layout_obstacle, linear_obstacle
from .products import gated_ffn, linear
from .rounding import Rounder
from .tiles import Tiles, packed_of, tiles_of

__all__ = [
    "DTYPES", "CudaError", "Rounder", "Tiles", "architecture", "cores", "decoder", "device_obstacle", "driver_version",
    "ffn_obstacle", "gated_ffn", "graded", "layout_obstacle", "linear", "linear_obstacle", "many", "missing", "packed_of",
    "tiles_of",
]  # fmt: skip
