"""The measurement on one NVIDIA GPU: the contenders of :mod:`.run`, and the peers that exist there.

Wall-clock time of whole decode steps, the token brought to the host each time as a real loop does.  Products alone, cuBLAS
and torch's own 4-bit kernel, are replayed as one CUDA graph over every matrix of a token: what a decoder cannot beat with
those kernels, attention and norms not counted.

Shape letters: T tokens, V vocabulary, O outputs, I inputs.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from actsparse import kernels
from actsparse.measure.bench.rows import Report, Row, Settings, relative_error, row_of
from actsparse.measure.reading import weights_read
from actsparse.models import caches, sites
from actsparse.models.sites import ModelError
from actsparse.plan import Plan
from actsparse.runtime.decode import Decoder
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import Meter
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.prompts import read
from actsparse.runtime.swap import attach_meter, prompts_of, restore, sparsify

CHECKED_STEPS = 4
_READ_BYTES = 2 << 30
_INT4_GROUPS = (32, 128)


class GpuRun:
    """Times everything on the GPU that holds ``model``; :meth:`measure` may be called once.

    Args:
        model: dense or packed, on one GPU.
        plans: plans for it, checked.
        settings: how much.
        teal_kernel: the file of TEAL's published kernel (``sparse_gemv.py``, which is run), None to leave it out.
        say: told what is going on.
        tolerance: largest relative error that two correct paths may show, of a dtype and a number of layers.
    """

    def __init__(
        self,
        model: Any,
        plans: Sequence[Plan],
        settings: Settings,
        say: Callable[[str], None],
        tolerance: Callable[..., float],
        teal_kernel: str | None = None,
    ) -> None:
        self._model, self._plans, self._settings, self._say = model, plans, settings, say
        self._tolerance, self._teal = tolerance, teal_kernel
        generator = torch.Generator().manual_seed(2)
        self._prompt = torch.randint(model.config.vocab_size, (settings.prompt_tokens,), generator=generator)
        self._prompt = self._prompt.to(model.device)
        self._buffer = torch.zeros(_READ_BYTES // 4, device=model.device)
        self._read_gb_s = [self._read_rate()]
        self._skipped: dict[str, str] = {"llama.cpp": "it was not built for this GPU: expected a CPU"}
        self._compiled: Callable[..., Any] | None = None

    def measure(self) -> Report:
        """All rows; a packed model has no dense weights that others could multiply, and is timed by itself."""
        head = self._model.get_output_embeddings()
        packed = isinstance(head, PackedLinear)
        weights = f"{head.packed.stored} bits" if packed else str(self._model.dtype).removeprefix("torch.")
        size = weights_read(self._model).bytes
        eager = Row("hf-eager", "transformers", weights, weights_read_bytes=size)
        compiled = Row("hf-compiled", "transformers, static cache, torch.compile", weights, weights_read_bytes=size)
        obstacle = Decoder.supports(self._model)
        dense = Row("packed" if packed else "dense", "native", weights, weights_read_bytes=size)
        dense.bits_read = weights_read(self._model).bits_read if packed else None
        rows = [eager, *([] if obstacle else [dense])]
        if obstacle:
            self._skipped[dense.name] = obstacle
        sparse = [row_of(plan, "transformers" if obstacle else "native", weights) for plan in self._plans]
        compiles = not packed
        if packed:
            teal = [] if self._teal is None else ["teal-kernel-products"]
            for name in (compiled.name, "cublas-products", "int4-products", *teal):
                self._skipped[name] = "the model is packed, and has no 16-bit weights to be compared with"
        for number in range(self._settings.repeats):
            self._say(f"round {number + 1} of {self._settings.repeats}")
            self._time(self._time_eager, eager)
            compiles = compiles and self._try_compiled(compiled)
            if not obstacle:
                self._time(self._time_native, dense)
            for plan, row in zip(self._plans, sparse, strict=True):
                sparsify(self._model, plan)
                try:
                    self._time(self._time_eager if obstacle else self._time_native, row)
                finally:
                    restore(self._model)
        rows += [compiled] if compiles else []
        products = [] if packed else [self._cublas(size, weights), *self._int4(), *self._teal_rows()]
        for _ in range(self._settings.repeats):
            for row, replay in products:
                row.decode_tok_s.append(1 / replay())
        return Report([*rows, *sparse, *(row for row, _ in products)], self._read_gb_s, self._skipped)

    def _time(self, contender: Callable[[Row], None], row: Row) -> None:
        torch.cuda.reset_peak_memory_stats(self._model.device)
        contender(row)
        peak = torch.cuda.max_memory_allocated(self._model.device) - self._buffer.nbytes
        # The least of the rounds: the first also holds what the check against the oracle takes.
        row.memory_bytes = min(peak, row.memory_bytes or peak)
        self._read_gb_s.append(self._read_rate())

    def _read_rate(self) -> float:
        """GB/s of adding up a buffer that no cache holds; the median of five."""
        return statistics.median(_READ_BYTES / 1e9 / _seconds(self._buffer.sum) for _ in range(5))

    # ---- whole models ----------------------------------------------------------------------------------------------

    def _time_eager(self, row: Row) -> None:
        """transformers as it comes: eager mode, a dynamic cache, greedy; a sparsified model's reading is counted first."""
        if row.sparsity is not None and not row.decode_tok_s:
            self._count(row)
        self._greedy(row, self._model, DynamicCache(config=self._model.config))

    def _try_compiled(self, row: Row) -> bool:
        """transformers with a static cache and a compiled forward; False, with the reason noted, when that fails."""
        try:
            if self._compiled is None:
                self._say("compiling transformers' forward")
                self._compiled = torch.compile(self._model, mode="reduce-overhead", fullgraph=True)
            length = self._settings.prompt_tokens + self._settings.new_tokens
            self._time(
                lambda row: self._greedy(
                    row, self._model, StaticCache(config=self._model.config, max_cache_len=length), self._compiled
                ),
                row,
            )
            return True
        except Exception as error:  # the compiler raises anything
            self._skipped[row.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            return False

    def _greedy(self, row: Row, model: Any, cache: Any, step: Callable[..., Any] | None = None) -> None:
        argument = caches.cache_argument(model.forward, cache)

        def forward(call: Callable[..., Any], tokens: torch.Tensor) -> int:
            return int(call(input_ids=tokens, use_cache=True, **argument).logits[0, -1].argmax())

        with torch.no_grad():
            prompt = self._prompt[None]
            for _ in range(1 if row.decode_tok_s else 3):  # the libraries' first calls
                model(input_ids=prompt[:, :1], use_cache=False)
            began = time.perf_counter()
            if prompts_of(model) is None:
                token = forward(model, prompt)
            else:
                token = int(read(model, prompt, cache, prompts_of(model)).logits[0, -1].argmax())
            row.prefill_tok_s.append(prompt.shape[1] / (time.perf_counter() - began))
            steps = self._settings.new_tokens
            # In every round: weights that were re-laid for a plan meanwhile are captured anew.
            warm = min(3, steps - 1) if step is not None else 0
            for index in range(steps):
                if index == warm:  # the compiler's work and the capture come before
                    began = time.perf_counter()
                # A copy each: a captured graph must not read what the next step overwrites.
                token = forward(model if step is None else step, torch.tensor([[token]], device=model.device))
            row.decode_tok_s.append((steps - warm) / (time.perf_counter() - began))

    def _time_native(self, row: Row) -> None:
        steps = self._settings.new_tokens
        decoder = Decoder(self._model, self._settings.prompt_tokens + steps + CHECKED_STEPS)
        if row.error is None:
            # On packed weights a last bit of an activation moves rounded coefficients: whole steps differ by more.
            row.error = self._check(decoder, sparse=row.sparsity is not None or row.name == "packed")
            if row.sparsity is not None:
                self._count(row)
        decoder.reset()
        decoder.prefill(self._prompt)
        for _ in range(2):  # captures the graph
            decoder.step(0)
        decoder.reset()
        began = time.perf_counter()
        token = int(decoder.prefill(self._prompt).argmax())
        row.prefill_tok_s.append(len(self._prompt) / (time.perf_counter() - began))
        if prompts_of(self._model) is not None:
            token = int(decoder.step(token).argmax())  # this prompt's neurons are captured
        began = time.perf_counter()
        for _ in range(steps - 1):
            token = int(decoder.step(token).argmax())
        row.decode_tok_s.append((steps - 1) / (time.perf_counter() - began))

    def _check(self, decoder: Decoder, *, sparse: bool) -> float:
        """Worst relative error of a site against the oracle in float32, in a decode step; whole steps of a dense model too.

        Site by site for a sparse one: thresholds are not continuous, see :class:`actsparse.measure.bench.run`.
        """
        model, worst = self._model, 0.0
        modules = {
            f"layer {layer.index} {name}": layer.product(name)
            for layer in sites.layers_of(model)
            for name in sites.ATTENTION_PROJECTIONS
        }
        seen: list[tuple[str, Any, torch.Tensor, torch.Tensor]] = []
        cache = DynamicCache()
        with torch.no_grad():
            read(model, self._prompt[None], cache, prompts_of(model))
            handles = [
                module.register_forward_hook(
                    lambda module, args, output, name=name: seen.append((name, module, args[0], output))
                )
                for name, module in modules.items()
            ]
            read(model, self._prompt[None, -1:], cache, None)
            for handle in handles:
                handle.remove()
            for name, module, x, got in seen:
                want = _oracle(module, x.float())
                error = relative_error(got, want)
                if error > self._tolerance(model.dtype, 1, sparse=sparse):
                    raise ModelError(f"{name} differs from the oracle: relative error {error:.3g}; not timed")
                worst = max(worst, error)
            if sparse:
                return worst
            decoder.reset()
            decoder.prefill(self._prompt)
            cache, token = DynamicCache(), int(self._prompt[-1])
            read(model, self._prompt[None], cache, None)
            for _ in range(CHECKED_STEPS):
                want = read(model, torch.tensor([[token]], device=model.device), cache, None).logits[0, -1].float()
                error = relative_error(decoder.step(token), want)
                if error > self._tolerance(model.dtype, len(sites.layers_of(model)), sparse=False):
                    raise ModelError(f"the decode step differs from the model's modules: error {error:.3g}; not timed")
                token = int(want.argmax())
        return worst

    def _count(self, row: Row) -> None:
        """What the modules read in a few decode steps that are not timed."""
        meter, cache = Meter(), DynamicCache()
        with torch.no_grad():
            read(self._model, self._prompt[None], cache, prompts_of(self._model))
            attach_meter(self._model, meter)
            for token in range(CHECKED_STEPS):
                read(self._model, torch.tensor([[token]], device=self._model.device), cache, None)
            attach_meter(self._model, None)
        read_weights = weights_read(self._model, meter)
        row.weights_read_bytes = read_weights.bytes
        if any(isinstance(module, GradedLinear) for module in self._model.modules()):
            row.bits_read = read_weights.bits_read
            return
        skipped = [value for site, value in meter.sparsity().items() if site.endswith(".down")]
        row.ffn_sparsity = sum(skipped) / max(1, len(sites.layers_of(self._model)))

    # ---- products alone --------------------------------------------------------------------------------------------

    def _weights(self) -> list[torch.Tensor]:
        """Every matrix of a token, [O, I]."""
        layers = sites.layers_of(self._model)
        found = [layer.product(name).weight.detach() for layer in layers for name, _ in layer.family.projections]
        return [*found, self._model.get_output_embeddings().weight.detach()]

    def _cublas(self, size: float, weights: str) -> tuple[Row, Callable[[], float]]:
        matrices = self._weights()
        inputs = {matrix.shape[1]: matrix.new_ones(1, matrix.shape[1]) for matrix in matrices}
        row = Row("cublas-products", "cuBLAS", weights, weights_read_bytes=size)
        return row, _graph(lambda: [F.linear(inputs[m.shape[1]], m) for m in matrices], self._model.device)

    def _int4(self) -> list[tuple[Row, Callable[[], float]]]:
        """torch's own 4-bit product on random codes of every matrix; the head stays as it is, as usual for this format."""
        if self._model.dtype != torch.bfloat16:
            self._skipped["int4"] = f"torch's 4-bit product is for bfloat16, weights are {self._model.dtype}"
            return []
        *layers, head = self._weights()
        found = []
        for group in _INT4_GROUPS:
            name = f"int4-products-g{group}"
            try:
                packed = [_random_int4(matrix, group) for matrix in layers]
            except RuntimeError as error:
                self._skipped[name] = str(error).splitlines()[0].partition(" (")[0]
                continue
            inputs = {matrix.shape[1]: matrix.new_ones(1, matrix.shape[1]) for matrix in (*layers, head)}

            def call(packed: Any = packed, inputs: Any = inputs, group: int = group) -> None:
                for (codes, scales), matrix in zip(packed, layers, strict=True):
                    torch.ops.aten._weight_int4pack_mm(inputs[matrix.shape[1]], codes, group, scales)
                F.linear(inputs[head.shape[1]], head)

            bits = 4 + 32 / group
            size = sum(matrix.numel() for matrix in layers) * bits / 8 + head.numel() * head.element_size()
            row = Row(name, "torch _weight_int4pack_mm", "4 bits", weights_read_bytes=size, bits_read=bits)
            found.append((row, _graph(call, self._model.device)))
        return found

    def _teal_rows(self) -> list[tuple[Row, Callable[[], float]]]:
        """TEAL's own kernel on every matrix but the head, in float16 as it wants, at each plan's sparsity."""
        if self._teal is None:
            return []
        multiply = _teal_kernel(self._teal)
        matrices = [matrix.half().T.contiguous().T for matrix in self._weights()[:-1]]
        head = self._weights()[-1]
        found = []
        for sparsity in sorted({plan.sparsity for plan in self._plans}):
            inputs = {
                m.shape[1]: torch.linspace(0, 1, m.shape[1], device=m.device).half()[None, None] for m in matrices
            }

            def call(inputs: Any = inputs, sparsity: float = sparsity) -> None:
                for matrix in matrices:
                    multiply(inputs[matrix.shape[1]], matrix, sparsity, round(100 * sparsity))
                F.linear(head.new_ones(1, head.shape[1]), head)

            size = 2 * (sum(m.numel() for m in matrices) * (1 - sparsity) + head.numel())
            row = Row("teal-kernel-products", "TEAL's Triton kernel", "float16", sparsity, weights_read_bytes=size)
            row.ffn_sparsity = sparsity
            found.append((row, _graph(call, self._model.device)))
        return found


def _oracle(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer of any kind gives in float32, by the oracle of its kind."""
    if isinstance(module, GradedLinear | PackedLinear):
        packed = module.packed
        packed = kernels.cuda.packed_of(packed) if isinstance(packed, kernels.cuda.Tiles) else packed
        levels = module.level_threshold if isinstance(module, GradedLinear) else None
        return kernels.planes.linear(x, packed, levels, module.center, module.start)
    bias = None if module.bias is None else module.bias.float()
    return kernels.reference.linear(x, module.weight.float(), bias, getattr(module, "threshold", None))


def _random_int4(matrix: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = matrix.shape
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=matrix.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return packed, torch.ones(columns // group, rows, 2, dtype=torch.bfloat16, device=matrix.device)


def _teal_kernel(file: str) -> Callable[..., torch.Tensor]:
    """``splitk_sparse_gemv`` of the file; ModelError when it cannot be had."""
    path = Path(file)
    spec = importlib.util.spec_from_file_location("teal_sparse_gemv", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ModelError(f"TEAL's kernel {file} is not a Python file, expected its sparse_gemv.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        multiply: Callable[..., torch.Tensor] = module.splitk_sparse_gemv
    except Exception as error:  # somebody else's file
        raise ModelError(f"TEAL's kernel {file} cannot be loaded: {type(error).__name__}: {error}") from None
    return multiply


def _seconds(call: Callable[[], Any]) -> float:
    """Time of one call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _graph(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """``call`` captured; what comes back replays it eight times and returns the seconds of one."""
    with torch.no_grad():
        for _ in range(2):
            call()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            call()

    def replay() -> None:
        for _ in range(8):
            graph.replay()

    def seconds(held: Callable[[], Any] = call) -> float:
        # Held, because a captured graph keeps nothing alive of what it reads.
        graph.replay()
        return _seconds(replay) / 8

    return seconds
