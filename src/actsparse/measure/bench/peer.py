"""llama.cpp on the same shape: a random-weight GGUF file, timed in a process of its own.

Of its own, because llama.cpp brings another OpenMP runtime, which beside torch's slows both down.  Run as
``python -m actsparse.measure.bench.peer FILE THREADS PROMPT_TOKENS NEW_TOKENS`` it times one file once.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = ("F16", "Q8_0", "Q4_0")
_BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Timing:
    """One run: tokens per second of the prefill and of single-token decoding."""

    prefill_tok_s: float
    decode_tok_s: float


class PeerError(RuntimeError):
    """llama.cpp could not be measured; the message is the reason to show."""


def obstacle(config: Any, directory: Path) -> str | None:
    """Why llama.cpp cannot be measured on this shape, in words; None when it can."""
    for package, module in (("llama-cpp-python", "llama_cpp"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed (pip install 'actsparse[bench]')"
    if config.hidden_size % 32 or config.intermediate_size % 32:
        return "its quantised formats need hidden and intermediate sizes in multiples of 32"
    needed = sum(weights_bytes(config, name) for name in FORMATS)
    free = shutil.disk_usage(directory).free
    if needed > free:
        return f"its files need {needed / 1e9:.1f} GB in {directory}, {free / 1e9:.1f} GB is free"
    return None


def weights_bytes(config: Any, name: str) -> int:
    """Weight bytes that one decoded token reads in format ``name``."""
    return round(sum(rows * columns for _, rows, columns in _matrices(config)) * _BITS[name] / 8)


def write(path: Path, config: Any, name: str) -> None:
    """Write a random-weight GGUF file of the shape of ``config`` in format ``name``, with a vocabulary of dummies.

    Matrices of one shape share their values: speed does not depend on them, and quantising each would take minutes.
    """
    import gguf
    import numpy as np

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, "MOSTLY_" + name))
    _add_vocabulary(writer, config.vocab_size)

    generator = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[name]
    made: dict[tuple[int, int], Any] = {}

    def matrix(tensor: str, rows: int, columns: int) -> None:
        if (rows, columns) not in made:
            values = generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
            made[rows, columns] = values.astype(np.float16) if name == "F16" else gguf.quants.quantize(values, kind)
        writer.add_tensor(tensor, made[rows, columns], raw_dtype=kind)

    ones = np.ones(config.hidden_size, dtype=np.float32)
    matrix("token_embd.weight", config.vocab_size, config.hidden_size)
    for tensor, rows, columns in _matrices(config):
        matrix(tensor, rows, columns)
    for layer in range(config.num_hidden_layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: Path, *, threads: int, prompt_tokens: int, new_tokens: int) -> Timing:
    """Time one file once in a fresh process; PeerError with the last line of what went wrong."""
    arguments = [str(path), str(threads), str(prompt_tokens), str(new_tokens)]
    command = [sys.executable, "-m", "actsparse.measure.bench.peer", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PeerError(f"llama.cpp took more than {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise PeerError(f"llama.cpp failed: {lines[-1]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


def _matrices(config: Any) -> list[tuple[str, int, int]]:
    """(tensor, out, in) of every matrix that a decoded token reads."""
    hidden, neurons, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    layer = [
        ("attn_q", heads * head_dim, hidden),
        ("attn_k", kv, hidden),
        ("attn_v", kv, hidden),
        ("attn_output", hidden, heads * head_dim),
        ("ffn_gate", neurons, hidden),
        ("ffn_up", neurons, hidden),
        ("ffn_down", hidden, neurons),
    ]
    blocks = [
        (f"blk.{index}.{tensor}.weight", rows, columns)
        for index in range(config.num_hidden_layers)
        for tensor, rows, columns in layer
    ]
    return [*blocks, ("output.weight", config.vocab_size, hidden)]


def _add_vocabulary(writer: Any, size: int) -> None:
    """The least that llama.cpp accepts: three special tokens, the bytes, then dummies."""
    import gguf

    kinds = gguf.TokenType
    special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    tokens = special + [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    tokens = (tokens + [(f"t{index}", kinds.NORMAL) for index in range(len(tokens), size)])[:size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _time(path: str, threads: int, prompt_tokens: int, new_tokens: int) -> Timing:
    import llama_cpp

    model = llama_cpp.Llama(
        path,
        n_ctx=prompt_tokens + new_tokens + 8,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )
    vocabulary = model.n_vocab()
    prompt = [3 + index * 7919 % (vocabulary - 3) for index in range(prompt_tokens)]
    # The first pass brings the file into memory and the threads to life.
    model.eval(prompt)
    model.eval([3])
    model.reset()
    began = time.perf_counter()
    model.eval(prompt)
    prefilled = time.perf_counter()
    for index in range(new_tokens):
        model.eval([3 + index % (vocabulary - 3)])
    ended = time.perf_counter()
    return Timing(prompt_tokens / (prefilled - began), new_tokens / (ended - prefilled))


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    print(json.dumps(vars(_time(file, *(int(number) for number in numbers)))))
