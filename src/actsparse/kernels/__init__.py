"""Products that read only the weights they need, with the choice of backend and its reason.

Shape letters: I in, O out, H hidden, N neurons, R rank; "..." any leading dimensions, whose product is the number of rows.

:func:`linear` and :func:`gated_ffn` take one of two paths, and :func:`path_for` names it. The native CPU path (C++, chosen
by instruction set) serves decoding: 1 to 8 rows, float32, bfloat16 or float16. On NVIDIA GPUs kernels compiled at run time
serve it in bfloat16 and float16 (:mod:`.cuda`). On other devices :mod:`.portable` does, which gathers the rows it needs in
plain PyTorch. Everything else, and any call that needs gradients, goes through :mod:`.reference`: the same masked arithmetic
as dense PyTorch products on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import cpu, cuda, many, merged, planes, portable, reference
from .cpu import (
    ACTIVATIONS,
    FFN,
    MAX_BATCH,
    Decoder,
    Layer,
    Matrix,
    Norm,
    available_isas,
    core_statistics,
    decode_step,
    decode_together,
    decoder_of,
    ffn_of,
    isa,
    layer_of,
    matrix_of,
    norm_of,
    read_bandwidth,
    reset_stats,
    select_isa,
    stats,
    use_huge_pages,
)
from .rules import NAMES, Rules

__all__ = [
    "ACTIVATIONS", "FFN", "MAX_BATCH", "Decoder", "Layer", "Matrix", "Norm", "Rules", "available_isas",
    "channel_statistics", "core_parts", "core_statistics", "cuda", "decode_step", "decode_together", "decoder_of", "explain",
    "ffn_of", "gated_ffn", "graded_linear", "graded_path", "isa", "layer_of", "linear", "matrix_of", "merged", "norm_of",
    "packed_of", "packed_on", "path_for", "planes", "portable", "read_bandwidth", "reference", "reset_stats", "select_isa",
    "stats", "unpack_columns", "use_huge_pages",
]  # fmt: skip


def _obstacle(x: Tensor, weights: tuple[Tensor | None, ...]) -> str:
    """Why a call cannot run natively; empty when it can."""
    if x.is_cpu:  # a fifth of the cost of device.type
        missing, dtypes = cpu.missing, cpu.DTYPES
    elif x.is_cuda:
        missing, dtypes = cuda.device_obstacle(x.device.index), cuda.DTYPES
    else:
        return f"x is on {x.device}; the native kernels run on the CPU and on CUDA"
    if missing:
        return missing
    dtype = x.dtype
    if dtype not in dtypes:
        return f"{dtype} has no native kernel"
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    if not 1 <= rows <= MAX_BATCH or x.shape[-1] == 0:
        return f"{rows} rows; the native kernels take 1 to {MAX_BATCH}"
    grad = torch.is_grad_enabled()
    if grad and x.requires_grad:
        return "x requires grad"
    for weight in weights:
        if weight is None:
            continue
        if weight.dtype != dtype:
            return f"a weight is {weight.dtype}, x is {dtype}"
        if weight.device != x.device:
            return f"a weight is on {weight.device}, x on {'the CPU' if x.is_cpu else x.device}"
        if x.is_cuda:
            obstacle = cuda.layout_obstacle(weight)
            if obstacle:
                return obstacle
        elif weight.dim() != 2 or weight.numel() == 0 or cpu.layout_of(weight) is None:
            layout = f"shape {tuple(weight.shape)}, strides {weight.stride()}"
            return f"a weight ({layout}) is neither contiguous nor the transpose of something contiguous"
        if grad and weight.requires_grad:
            return "a weight requires grad"
    return ""


# Where rows are not gathered in plain PyTorch: CPU and CUDA have kernels (what those do not take is multiplied densely, because
# gathering costs a synchronisation on a GPU), meta tensors have no values.
NOT_PORTABLE = frozenset({"cpu", "cuda", "meta"})


def _gathers(x: Tensor) -> bool:
    """Whether a call without native kernel goes through :mod:`.portable`: decode steps on devices that have none."""
    return x.device.type not in NOT_PORTABLE and 1 <= _rows(x) <= MAX_BATCH and not torch.compiler.is_compiling()


def path_for(x: Tensor, *weights: Tensor | None) -> str:
    """The path of a call with these operands.

    "cpu-" and avx512, avx2, neon or scalar, "cuda-" and the architecture (sm_90), "portable" or "reference".
    """
    if not _obstacle(x, weights):
        return f"cuda-{cuda.architecture(x.device.index)}" if x.is_cuda else f"cpu-{isa()}"
    return "portable" if _gathers(x) else "reference"


def explain(x: Tensor, *weights: Tensor | None) -> str:
    """The path of :func:`path_for` with its reason, for people."""
    obstacle, path = _obstacle(x, weights), path_for(x, *weights)
    if obstacle:
        return f"{path}: {obstacle}"
    if x.is_cuda:
        return f"{path}: {x.dtype} on {torch.cuda.get_device_name(x.device)}"
    note = f"; {cpu.threads_note}" if cpu.threads_note else f", {torch.get_num_threads()} threads"
    return f"{path}: {x.dtype} on the CPU{note}"


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


# ---- statistics for calibration --------------------------------------------------------------------------------------


def core_parts(x: Tensor, stops: Sequence[int], count: int, share: float, *, positive: bool) -> Tensor:
    """As :func:`.reference.core_parts`; on a GPU in two passes through memory where the type and size allow it."""
    if x.device.type == "cuda" and cuda.cores.fits(x):
        return cuda.cores.core_parts(x, stops, count, share, positive=positive)
    return reference.core_parts(x, stops, count, share, positive=positive)


def channel_statistics(
    x: Tensor,
    counts: Tensor | None,
    min_exponent: int,
    sub_bits: int,
    sum_abs: Tensor | None,
    sum_square: Tensor | None,
) -> int:
    """:func:`actsparse.kernels.reference.channel_statistics`: native on the CPU, in plain PyTorch on other devices."""
    compute = cpu.channel_statistics if x.is_cpu else portable.channel_statistics
    return compute(x, counts, min_exponent, sub_bits, sum_abs, sum_square)


# ---- linear ----------------------------------------------------------------------------------------------------------


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected two dimensions")
    out, inn = weight.shape
    if x.dim() == 0 or x.shape[-1] != inn:
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} takes {inn} features")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out},)")
    if threshold is not None and threshold.shape != (inn,):
        raise ValueError(f"threshold has shape {tuple(threshold.shape)}, expected ({inn},)")


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    _check_linear(x, weight, bias, threshold)
    if _gathers(x):
        return portable.linear(x, weight, bias, threshold)
    if _rows(x) <= MAX_BATCH:
        return reference.linear(x, weight, bias, threshold)
    if x.is_cuda and cuda.many.fits(Rules("identity"), x, weight, bias):
        return cuda.many.linear(x, weight, bias, threshold)
    return reference.linear_masked(x, weight, bias, threshold)


def _linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or _obstacle(x, (weight,)):
        return _linear_reference(x, weight, bias, threshold)
    _check_linear(x, weight, bias, threshold)
    if x.is_cuda:
        if cuda.linear_obstacle(x, weight):
            return _linear_reference(x, weight, bias, threshold)
        return cuda.linear(x, weight, bias, threshold)
    return cpu.linear(x, weight, bias, threshold)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    """y = W x~ + bias, where x~ is x with every value under its threshold in magnitude replaced by 0.

    x [..., I]; weight logical [O, I], where a transposed view of contiguous [I, O] storage is the layout that skips reading
    the columns of dropped values; bias [O]; threshold float32 [I] or None. A value is dropped when |x| < t: ties and NaN are
    kept. Returns [..., O] in x's type. Raises ValueError when shapes do not fit.
    """
    if torch.compiler.is_compiling():
        if x.device.type in ("cpu", "cuda"):
            return torch.ops.actsparse.linear(x, weight, bias, threshold)
        return _linear_reference(x, weight, bias, threshold)
    if type(x) is Tensor and _get_current_dispatch_mode() is None:
        return _linear_native(x, weight, bias, threshold)
    return torch.ops.actsparse.linear(x, weight, bias, threshold)


# ---- packed matrices ---------------------------------------------------------------------------------------------------

# The structure last made for a packed matrix, and the tensors that it was made for.
Nested = planes.Packed | cuda.Tiles
_matrices: WeakKeyDictionary[planes.Packed, tuple[tuple[Tensor | None, ...], Matrix]] = WeakKeyDictionary()


def _packed_obstacle(x: Tensor, packed: planes.Packed) -> str:
    return _obstacle(x, ()) or cpu.packed_obstacle(packed)


def packed_on(packed: Nested, device: torch.device) -> Nested:
    """The same matrix on ``device``, in the order of bytes that its kernels read."""
    if packed.scale.device == device and isinstance(packed, cuda.Tiles) == (device.type == "cuda"):
        return packed
    host = cuda.packed_of(packed, "cpu") if isinstance(packed, cuda.Tiles) else packed
    return cuda.tiles_of(host, device) if device.type == "cuda" else planes.relaid(host, device)


def packed_of(packed: Nested, *rules: Tensor | None) -> Any:
    """A packed matrix with thresholds, center and start for the decode step of the device that holds it."""
    return cuda.graded.plane_matrix(packed, *rules) if isinstance(packed, cuda.Tiles) else cpu.packed_of(packed, *rules)


def graded_path(x: Tensor, packed: Nested) -> str:
    """The path of :func:`graded_linear` with these operands: "cpu-" and the instruction set, "cuda-", or "reference".

    Of more than 8 rows on the CPU, when every plane is read.
    """
    if isinstance(packed, cuda.Tiles):
        return "reference" if cuda.graded.graded_obstacle(x, packed) else f"cuda-{cuda.architecture(x.device.index)}"
    natively = not _packed_obstacle(x, packed)
    if not natively and _rows(x) > MAX_BATCH:
        natively = x.is_cpu and not cpu.missing and not cpu.packed_obstacle(packed) and many.fits(x)
    return f"cpu-{isa()}" if natively else "reference"


def _matrix_for(packed: planes.Packed, *rules: Tensor | None) -> Matrix | None:
    """The structure for a packed matrix with these rules, kept while they stay the same; None where there can be none."""
    known = _matrices.get(packed)
    if known is not None and all(a is b for a, b in zip(known[0], rules, strict=True)):
        return known[1]
    if cpu.missing or cpu.packed_obstacle(packed):
        return None
    matrix = cpu.packed_of(packed, *rules)
    _matrices[packed] = (rules, matrix)
    return matrix


def graded_linear(
    x: Tensor,
    packed: Nested,
    thresholds: Tensor | None = None,
    center: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """y = start + sum over i of (x_i - center_i) W_b[:, i], b the level that ``|x_i - center_i|`` reads of a packed W.

    x [..., I]; thresholds float32 [L, I], not falling along L (None: every plane is read), center float32 [I], start float32
    [O].  Returns [..., O] in x's type; see :func:`actsparse.kernels.planes.linear`.  1 to 8 rows on the CPU are multiplied in
    the packed matrix, by whole numbers (``docs/format.md`` bounds the difference); more rows with weights that are unpacked a
    few columns at a time.  Raises ValueError when shapes do not fit.
    """
    if x.dim() == 0 or x.shape[-1] != packed.inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}, the packed matrix takes {packed.inputs} features")
    if isinstance(packed, cuda.Tiles):
        return cuda.graded.graded_linear(x, packed, thresholds, center, start)
    matrix = None if torch.compiler.is_compiling() else _matrix_for(packed, thresholds, center, start)
    if matrix is not None and not _obstacle(x, ()):
        return cpu.graded_linear(x, matrix)
    if _rows(x) <= MAX_BATCH:
        return planes.linear(x, packed, thresholds, center, start)
    if matrix is None or x.dtype not in cpu.DTYPES or not x.is_cpu:
        return planes.linear(x, packed, thresholds, center, start, x.dtype)
    return many.graded_rows(x, packed, matrix, thresholds, center, start)


def unpack_columns(packed: planes.Packed, begin: int, end: int, dtype: torch.dtype, level: int | None = None) -> Tensor:
    """W[:, begin:end] of a packed matrix read to ``level`` bits (None: all of them), transposed: [end - begin, O].

    Raises ValueError for columns or a level that the matrix does not have.
    """
    level = packed.stored if level is None else level
    if level not in packed.levels:
        raise ValueError(f"level is {level}, expected one of {', '.join(map(str, packed.levels))}")
    if not 0 <= begin <= end <= packed.inputs:
        raise ValueError(f"columns {begin} to {end}, expected some of {packed.inputs}")
    known = _matrices.get(packed)
    matrix = known[1] if known is not None else _matrix_for(packed, None, None, None)
    if matrix is None or dtype not in cpu.DTYPES:
        return planes.unpack(planes.columns_of(packed, begin, end), level, dtype).T
    return cpu.unpack_columns(matrix, begin, end, level // 2, dtype)


# ---- feed-forward block ----------------------------------------------------------------------------------------------


def _check_ffn(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> None:
    if up.dim() != 2 or down.dim() != 2 or (gate is not None and gate.dim() != 2):
        raise ValueError("gate, up and down must have two dimensions")
    neurons, hidden = up.shape
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}, up {tuple(up.shape)} takes {hidden} features")
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}, up {tuple(up.shape)}")
    if down.shape[1] != neurons:
        raise ValueError(f"down has shape {tuple(down.shape)}, expected (H, {neurons})")
    cpu.activation_code(rules.activation)
    cpu.activation_code(rules.up_activation)
    rules.check(neurons, hidden, down.shape[0])
    index = rules.neurons
    if index is not None and (index.dim() != 1 or index.dtype != torch.int32):
        raise ValueError(f"neurons must be int32 [count], got {index.dtype} {tuple(index.shape)}")


def _ffn_reference(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> Tensor:
    _check_ffn(x, gate, up, down, rules)
    if _gathers(x):
        return portable.gated_ffn(x, gate, up, down, rules)
    if _rows(x) <= MAX_BATCH:
        return reference.gated_ffn(x, gate, up, down, rules)
    if x.is_cuda and cuda.many.fits(rules, x, gate, up, down):
        return cuda.many.gated_ffn(x, gate, up, down, rules)
    return reference.gated_ffn_masked(x, gate, up, down, rules)


def _ffn_native(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules) -> Tensor:
    if _obstacle(x, (gate, up, down, rules.predictor_a, rules.predictor_b)):
        return _ffn_reference(x, gate, up, down, rules)
    _check_ffn(x, gate, up, down, rules)
    if x.is_cuda:
        if cuda.ffn_obstacle(x, gate, up, down, rules):
            return _ffn_reference(x, gate, up, down, rules)
        return cuda.gated_ffn(x, gate, up, down, rules)
    return cpu.gated_ffn(x, ffn_of(gate, up, down, rules))


def gated_ffn(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, rules: Rules | None = None, **options: Any
) -> Tensor:
    """One feed-forward block that computes only the neurons it needs.

    x [..., H]; gate and up logical [N, H], down logical [H, N] (stored transposed, [N, H], so that a neuron is contiguous);
    ``options`` are the attributes of :class:`Rules` where no ``rules`` are given::

        candidates  every neuron, those in ``neurons`` (int32, ascending), those with predictor_b (predictor_a x) +
                    predictor_bias > 0 (a [R, H], b [N, R]), or both conditions
        g           activation(gate x~ + gate_bias), x~ = x kept by gate_in_threshold [H]
        u           up_activation(up x~ + up_bias), x~ = x kept by up_in_threshold [H]
        kept        candidates with not |g| < gate_threshold [N] and not |g u| < value_threshold [N]
        y           down_bias + sum over kept neurons of (g u - mean) down[:, neuron], mean [N]

    With gate None the block is plain: g = activation(up x + up_bias) and u is 1. Gate or up stored transposed (columns
    layout) skip dropped inputs instead of neurons. Several rows share one reading of the union of what they keep, each with
    exactly its own mask. Returns [..., H] in x's type. Raises ValueError when shapes do not fit or an activation is unknown.
    """
    if rules is None:
        rules = Rules(**options)
    if not torch.compiler.is_compiling():
        if type(x) is Tensor and _get_current_dispatch_mode() is None:
            return _ffn_native(x, gate, up, down, rules)
    elif x.device.type not in ("cpu", "cuda"):
        return _ffn_reference(x, gate, up, down, rules)
    return torch.ops.actsparse.gated_ffn(x, gate, up, down, *rules.values())


# ---- registration ----------------------------------------------------------------------------------------------------
# Library.define and impl rather than the custom_op decorator, whose wrappers cost 20 us a call.

_library = torch.library.Library("actsparse", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? threshold=None) -> Tensor")
_library.define(
    "gated_ffn(Tensor x, Tensor? gate, Tensor up, Tensor down, str activation, str up_activation, "
    + ", ".join(f"Tensor? {name}" for name in NAMES[2:])
    + ") -> Tensor"
)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    _check_linear(x, weight, bias, threshold)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_autograd(x: Tensor, weight: Tensor, bias: Tensor | None = None, threshold: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _linear_reference(x, weight, bias, threshold)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.actsparse.linear(x, weight, bias, threshold)


def _ffn_op_native(*args: Any) -> Tensor:
    x, gate, up, down = args[:4]
    return _ffn_native(x, gate, up, down, Rules(*args[4:]))


def _ffn_op_reference(*args: Any) -> Tensor:
    x, gate, up, down = args[:4]
    return _ffn_reference(x, gate, up, down, Rules(*args[4:]))


def _ffn_fake(*args: Any) -> Tensor:
    x, gate, up, down = args[:4]
    _check_ffn(x, gate, up, down, Rules(*args[4:]))
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _ffn_autograd(*args: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        return _ffn_op_reference(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.actsparse.gated_ffn(*args)


for _name, _native, _any, _fake, _autograd in (
    ("linear", _linear_native, _linear_reference, _linear_fake, _linear_autograd),
    ("gated_ffn", _ffn_op_native, _ffn_op_reference, _ffn_fake, _ffn_autograd),
):
    _library.impl(_name, _native, "CPU")
    _library.impl(_name, _native, "CUDA")
    _library.impl(_name, _any, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"actsparse::{_name}", _fake, lib=_library)
