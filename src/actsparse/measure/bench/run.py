"""The measurement itself.

Every round times every contender once, so that a machine that slows down slows all of them; the read bandwidth is taken
before the first and after each.  A native decode step is timed only after it agrees with the model's own modules.

Shape letters: T tokens, W windows, L window length, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from actsparse import kernels
from actsparse.calibration.collect import Calibration, Progress, check_sparsity
from actsparse.measure.bench import peer
from actsparse.measure.bench.gpu import GpuRun
from actsparse.measure.bench.rows import Report, Row, Settings, relative_error, row_of
from actsparse.measure.bench.shapes import available_bytes
from actsparse.measure.reading import weights_read
from actsparse.methods import Method
from actsparse.methods.base import Targets
from actsparse.models import sites
from actsparse.models.sites import ModelError
from actsparse.models.text import Windows
from actsparse.plan import ModelIdentity, Plan
from actsparse.runtime.decode import Decoder
from actsparse.runtime.graded import GradedLinear
from actsparse.runtime.layers import Meter
from actsparse.runtime.packed import PackedLinear
from actsparse.runtime.prompts import read
from actsparse.runtime.swap import attach_meter, prompts_of, restore, sparsify

CALIBRATION_WINDOW = 256
CHECKED_STEPS = 4
# Of the prompt: enough for a plan to choose neurons by; a whole long one would be read four more times.
CHECKED_PROMPT = 32


def measure(
    model: Any,
    plans: Sequence[Plan],
    settings: Settings,
    *,
    say: Callable[[str], None],
    teal_kernel: str | None = None,
) -> Report:
    """Time the dense model through transformers and natively, each plan natively, and llama.cpp on the same shape.

    On a GPU there is no llama.cpp, but transformers compiled, and the products alone of cuBLAS and others (:mod:`.gpu`).
    A model without a native decode step is timed through transformers' modules only; every row says which path it took.
    The model is left dense.

    Args:
        model: a Hugging Face model on the CPU or on one GPU.
        plans: plans for it.
        settings: how much.
        say: told what is going on, one line each.
        teal_kernel: file of TEAL's published kernel, to time it too, on a GPU.

    Raises:
        PlanError: a plan for another model, or one for evaluation only.
        ModelError: too many tokens for the context, or a native step that does not agree.
    """
    restore(model)
    for plan in plans:
        plan.check_decodable()
    for plan in plans:
        plan.check_model(ModelIdentity(**sites.describe(model)))
    context = model.config.max_position_embeddings
    if settings.prompt_tokens + settings.new_tokens > context:
        raise ModelError(
            f"{settings.prompt_tokens} + {settings.new_tokens} tokens were asked for, "
            f"expected at most the model's context of {context}"
        )
    if model.device.type == "cuda":
        return GpuRun(model, plans, settings, say, tolerance, teal_kernel).measure()
    if teal_kernel is not None:
        raise ModelError(f"TEAL's kernel {teal_kernel} was given for a model on the CPU: expected --device cuda")
    with tempfile.TemporaryDirectory(prefix="actsparse-bench-") as directory:
        return _Run(model, plans, settings, Path(directory), say).measure()


def calibrate_on_random_tokens(
    model: Any, method: Method, targets: Sequence[float], *, tokens: int, progress: Progress
) -> list[Plan]:
    """One plan per target, from the model's own activations on random tokens.

    For random weights there is no better text; the sparsity they give is counted when it is measured.
    """
    check_sparsity(targets)
    window = min(CALIBRATION_WINDOW, model.config.max_position_embeddings, tokens)
    generator = torch.Generator().manual_seed(1)
    rows = max(1, tokens // window)
    drawn = torch.randint(model.config.vocab_size, (rows, window), generator=generator)
    run = Calibration(model, Windows(drawn, "random tokens", ("",) * rows), [method])
    calibrated = run.collect(progress=progress)[method.name]
    return [run.solve(method, calibrated, Targets(target)) for target in targets]


class _Native:
    """The native path of the model as it is now."""

    def __init__(self, model: Any, prompt: torch.Tensor, settings: Settings) -> None:
        self._prompt = prompt
        self._settings = settings
        # The kernels count columns of packed matrices by their bytes alone.
        self.packed = any(isinstance(module, GradedLinear | PackedLinear) for module in model.modules())
        self.decoder = Decoder(model, settings.prompt_tokens + settings.new_tokens + CHECKED_STEPS)

    def time(self, row: Row) -> None:
        """One round."""
        decoder, steps = self.decoder, self._settings.new_tokens
        self._start(self._prompt)
        for _ in range(2):  # caches and branch predictors know nothing of these weights yet
            decoder.step(0)
        decoder.reset()
        began = time.perf_counter()
        token = int(decoder.prefill(self._prompt).argmax())
        row.prefill_tok_s.append(len(self._prompt) / (time.perf_counter() - began))
        before = decoder.stats()
        began = time.perf_counter()
        for _ in range(steps):
            token = int(decoder.step(token).argmax())
        seconds = (time.perf_counter() - began) / steps
        done = {name: (value - before[name]) / steps for name, value in decoder.stats().items()}
        row.decode_tok_s.append(1 / seconds)
        row.weights_read_bytes = done["bytes"]
        blocks = [decoder.native.layer[index].ffn for index in range(decoder.native.layers)]
        neurons = sum(block.down.in_ for block in blocks)
        # A dense block's down is stored by rows, each of which reads every neuron.
        by_rows = sum(block.down.in_ - block.down.out for block in blocks if block.down.layout == kernels.cpu.ROWS)
        if not self.packed:
            row.ffn_sparsity = 1 - (done["down_rows"] + by_rows) / neurons
        row.overhead.append(1 - done["product_ns"] / (seconds * 1e9))

    def check(self, model: Any) -> float:
        """Worst relative error of a site (q, k, v, o or FFN of any layer) on the module path's own input, in a decode step.

        Site by site, because thresholds are not continuous: rounding decides about values on the edge, a site downstream
        of such a one meets other values near its own edge, and within a layer that turns rounding into a fifth of the
        output without either path being wrong.  How sites combine is checked on the dense model, by whole steps.
        """
        native, library = self.decoder.native, kernels.cpu.library()
        prompt = self._prompt[:CHECKED_PROMPT]
        self._start(prompt)  # a plan may let the prompt choose neurons
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        cache = DynamicCache()
        with torch.no_grad():
            read(model, prompt[None], cache, prompts_of(model))
            handles = []
            for first, last in site_modules(model):
                handles.append(first.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
                handles.append(last.register_forward_hook(lambda _, args, output: outputs.append(output)))
            read(model, prompt[None, -1:], cache, None)
        for handle in handles:
            handle.remove()
        worst, code = 0.0, kernels.cpu.DTYPES[model.dtype]
        for at, (x, want) in enumerate(zip(inputs, outputs, strict=True)):
            layer, site = native.layer[at // 5], at % 5
            x, got = x.contiguous(), torch.empty_like(want)
            if site == 4:
                failed = library.as_ffn_forward(layer.ffn, x.data_ptr(), got.data_ptr(), 1, code, None)
            else:
                name = sites.ATTENTION_PROJECTIONS[site]
                threshold = getattr(layer, f"{name}_threshold")
                matrix = getattr(layer, name)
                failed = library.as_linear(matrix, threshold, x.data_ptr(), got.data_ptr(), 1, code, None)
            if failed:
                raise ModelError(f"the kernels refuse site {site} of layer {at // 5} with code {failed}")
            worst = max(worst, relative_error(got, want))
        return worst

    def check_steps(self, model: Any) -> float:
        """Worst relative error of a few whole decode steps' logits."""
        cache = DynamicCache()
        prompt = self._prompt[:CHECKED_PROMPT]
        token, worst = int(prompt[-1]), 0.0
        self._start(prompt)
        with torch.no_grad():
            read(model, prompt[None], cache, prompts_of(model))
            for _ in range(CHECKED_STEPS):
                output = read(model, torch.tensor([[token]]), cache, None)
                want = output.logits[0, -1].float()
                got = self.decoder.step(token)
                worst = max(worst, relative_error(got, want))
                token = int(want.argmax())
        self.decoder.reset()
        return worst

    def _start(self, prompt: torch.Tensor) -> None:
        self.decoder.reset()
        self.decoder.prefill(prompt)


def tolerance(dtype: torch.dtype, layers: int, *, sparse: bool) -> float:
    """Largest relative error that two correct paths through ``layers`` layers may show.

    Each layer rounds a dozen times to ``dtype`` on the modules' side, independently: errors add like a square root.  Under
    thresholds a fraction eps of the values lies within rounding of its threshold; what one path keeps and the other skips
    of them is sqrt(eps) of a product's norm.
    """
    eps = max(torch.finfo(dtype).eps / 2, 1e-6)
    return eps * math.sqrt(12 * layers) + (math.sqrt(eps * layers) if sparse else 0)


def site_modules(model: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Where q, k, v, o and the FFN begin and end, layer by layer."""
    modules = []
    for layer in sites.layers_of(model):
        modules += [(layer.product(name),) * 2 for name in sites.ATTENTION_PROJECTIONS]
        # A plain block's projections may lie in the layer itself.
        modules.append((layer.ffn, layer.ffn if layer.family.gated else layer.product("down")))
    return modules


def _refuse(row: Row, error: float, allowed: float, what: str) -> None:
    if not error <= allowed:
        raise ModelError(
            f"the native decode step of {row.name} differs from the model's modules: relative error {error:.3g} of {what}, "
            f"expected at most {allowed:.3g}; not timed"
        )


class _Run:
    def __init__(
        self, model: Any, plans: Sequence[Plan], settings: Settings, directory: Path, say: Callable[[str], None]
    ) -> None:
        self._model, self._plans, self._settings, self._directory, self._say = model, plans, settings, directory, say
        generator = torch.Generator().manual_seed(2)
        self._prompt = torch.randint(model.config.vocab_size, (settings.prompt_tokens,), generator=generator)
        self._layers = len(sites.layers_of(model))
        self._reading = kernels.cpu.ReadTest()
        self._read_gb_s = [self._reading.gb_s()]
        self._skipped: dict[str, str] = {}

    def measure(self) -> Report:
        obstacle = Decoder.supports(self._model)
        path, time_plan = ("native", self._time_native) if obstacle is None else ("transformers", self._time_modules)
        if obstacle is not None:
            self._say(f"{obstacle}: decoding goes through transformers' modules")
            self._skipped["dense"] = obstacle
        files = self._peer_files(obstacle) if self._settings.llama_cpp else {}
        head = self._model.get_output_embeddings()
        packed = isinstance(head, PackedLinear)
        weights = f"{head.packed.stored} bits" if packed else str(self._model.dtype).removeprefix("torch.")
        eager = Row("hf-eager", "transformers", weights, weights_read_bytes=weights_read(self._model).bytes)
        dense = [Row("packed" if packed else "dense", path, weights)] if obstacle is None else []
        sparse = [row_of(plan, path, weights) for plan in self._plans]
        peers = {name: Row(f"llama.cpp-{name.lower()}", "llama.cpp", name) for name in files}
        for round_number in range(self._settings.repeats):
            self._say(f"round {round_number + 1} of {self._settings.repeats}")
            self._time(self._time_eager, eager)
            for row in dense:
                self._time(self._time_native, row)
            for plan, row in zip(self._plans, sparse, strict=True):
                sparsify(self._model, plan)
                try:
                    self._time(time_plan, row)
                finally:
                    restore(self._model)
            for name, file in list(files.items()):
                self._time(self._time_peer, peers[name], name, file, files)
        timed = [row for row in peers.values() if row.decode_tok_s]
        return Report([eager, *dense, *sparse, *timed], self._read_gb_s, self._skipped)

    def _time(self, contender: Callable[..., None], *arguments: Any) -> None:
        # Beside every contender, because a shared machine's bandwidth changes within seconds.
        contender(*arguments)
        self._read_gb_s.append(self._reading.gb_s())

    def _time_eager(self, row: Row) -> None:
        """transformers as it comes: eager mode, a dynamic cache, greedy, without generate's own bookkeeping."""
        cache = DynamicCache(config=self._model.config)

        def greedy(tokens: torch.Tensor) -> torch.Tensor:
            output = read(self._model, tokens, cache, None)
            return output.logits[0, -1].argmax().view(1, 1)

        with torch.no_grad():
            self._model(input_ids=self._prompt[None, :1], use_cache=False)
            began = time.perf_counter()
            token = greedy(self._prompt[None])
            row.prefill_tok_s.append(len(self._prompt) / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in range(self._settings.new_tokens):
                token = greedy(token)
            row.decode_tok_s.append(self._settings.new_tokens / (time.perf_counter() - began))

    def _time_modules(self, row: Row) -> None:
        """The sparse modules inside the Hugging Face model; what they read is counted once, in steps that are not timed."""
        if not row.decode_tok_s:
            meter = Meter()
            cache = DynamicCache(config=self._model.config)
            with torch.no_grad():
                read(self._model, self._prompt[None], cache, prompts_of(self._model))
                attach_meter(self._model, meter)
                for token in range(CHECKED_STEPS):
                    read(self._model, torch.tensor([[token]]), cache, None)
                attach_meter(self._model, None)
            row.weights_read_bytes = weights_read(self._model, meter).bytes
            skipped = [value for site, value in meter.sparsity().items() if site.endswith(".down")]
            row.ffn_sparsity = sum(skipped) / self._layers
        self._time_eager(row)

    def _time_native(self, row: Row) -> None:
        native = _Native(self._model, self._prompt, self._settings)
        if row.error is None:
            # On packed weights a last bit of an activation moves coefficients of eight bits: whole steps differ by more.
            sparse = row.sparsity is not None or native.packed
            meter = Meter()
            # Packed products count beside the kernels' own call; others compute in another way while they are metered.
            attach_meter(self._model, meter if native.packed else None)
            row.error = native.check(self._model)
            attach_meter(self._model, None)
            if native.packed:
                row.bits_read = weights_read(self._model, meter).bits_read
            _refuse(row, row.error, tolerance(self._model.dtype, 1, sparse=sparse), "a site's output")
            if not sparse:
                _refuse(
                    row,
                    native.check_steps(self._model),
                    tolerance(self._model.dtype, self._layers, sparse=False),
                    "logits",
                )
        native.time(row)

    def _peer_files(self, obstacle: str | None) -> dict[str, Path]:
        config = self._model.config
        # The files written for it have Llama's layers, as the native step has.
        reason = obstacle or peer.obstacle(config, self._directory)
        if reason is not None:
            self._skipped["llama.cpp"] = reason
            return {}
        files = {}
        for name in peer.FORMATS:
            if name == "F16" and isinstance(self._model.get_output_embeddings(), PackedLinear):
                self._skipped["llama.cpp-f16"] = "the model is packed, and has no 16-bit weights to be compared with"
                continue
            needed, available = peer.weights_bytes(config, name), available_bytes()
            if available is not None and needed > available:
                self._skipped[f"llama.cpp-{name.lower()}"] = (
                    f"its weights are {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB of memory is available"
                )
                continue
            self._say(f"writing a {name} file of this shape for llama.cpp")
            files[name] = self._directory / f"{name}.gguf"
            peer.write(files[name], config, name)
        return files

    def _time_peer(self, row: Row, name: str, file: Path, files: dict[str, Path]) -> None:
        try:
            timing = peer.measure(
                file,
                threads=torch.get_num_threads(),
                prompt_tokens=self._settings.prompt_tokens,
                new_tokens=self._settings.new_tokens,
            )
        except peer.PeerError as error:
            self._skipped[row.name] = str(error)
            del files[name]
            return
        row.weights_read_bytes = peer.weights_bytes(self._model.config, name)
        row.decode_tok_s.append(timing.decode_tok_s)
        row.prefill_tok_s.append(timing.prefill_tok_s)
