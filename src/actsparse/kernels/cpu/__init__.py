"""The CPU kernels: C++ (``csrc/``) behind a C interface, called through ctypes.

Nothing here decides whether a call may run natively: that is :mod:`actsparse.kernels`' part.
"""

from .decoder import decode_step, decode_together, decoder_of, layer_of, norm_of
from .loading import (
    MAX_BATCH,
    available_isas,
    isa,
    library,
    missing,
    pages_followed,
    reset_stats,
    select_isa,
    select_pages,
    stats,
    threads_note,
)
from .memory import ReadTest, read_bandwidth, use_huge_pages
from .packed import graded_linear, has_many_rows, many_rows, packed_obstacle, packed_of, unpack_columns
from .products import gated_ffn, linear, linear_rows, time_calls
from .rounding import Rounder
from .statistics import channel_statistics, core_statistics
from .structures import (
    ACTIVATIONS,
    DTYPES,
    FFN,
    ROWS,
    Call,
    Decoder,
    Layer,
    Matrix,
    Norm,
    Stats,
    activation_code,
    ffn_of,
    layout_of,
    matrix_of,
    skipped_by,
)

__all__ = [
    "ACTIVATIONS", "DTYPES", "FFN", "MAX_BATCH", "ROWS", "Call", "Decoder", "Layer", "Matrix", "Norm", "ReadTest", "Rounder",
    "Stats",
    "activation_code", "available_isas", "channel_statistics", "core_statistics", "decode_step", "decode_together",
    "decoder_of", "ffn_of", "gated_ffn", "graded_linear", "has_many_rows", "isa", "layer_of", "layout_of", "library",
    "linear", "linear_rows", "many_rows", "matrix_of", "missing", "norm_of", "packed_obstacle", "packed_of", "pages_followed",
    "read_bandwidth", "reset_stats", "select_isa", "select_pages", "skipped_by", "stats", "threads_note", "time_calls",
    "unpack_columns", "use_huge_pages",
]  # fmt: skip
