#!/usr/bin/env python3
"""Train one of the reference models from scratch on one GPU, inside a time budget.

    python reference/train.py --activation silu --text DIR_OR_TOKENS --out reference/swiglu --seconds 450 --seed 0
    python reference/train.py --activation relu --text DIR_OR_TOKENS --out reference/reglu --seconds 450 --seed 0

``--text`` names the folder that ``build_text.py --cache`` wrote (it holds ``train.jsonl.xz``), or a folder made by
``--prepare-only``, which holds the tokenizer and the tokens of that text and is smaller.

The model is a Llama with tied embeddings (RMSNorm, rotary positions, grouped-query attention, gated FFN) written in
plain PyTorch with the parameter names of transformers. It trains in bfloat16 autocast over float32 weights: Muon for
the matrices, AdamW for the embedding and the norms. The learning rate follows the share of the budget that has passed,
so a run always ends in time, whatever the GPU.

With ``--activation relu`` an L1 penalty on the gate activations makes them sparse, as ProSparse does: a controller per
layer raises or lowers the layer's penalty so that its share of exact zeros follows a target, which rises from the
natural level to ``--sparsity`` over the first half of the run and stays there.

The result is an ordinary Hugging Face folder with bfloat16 weights. The script opens it again with transformers and
fails unless the logits and the perplexity are those of its own model.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
DOMAINS = ("man", "doc", "python", "rustdoc")


class RecipeError(Exception):
    """A problem to show the user as one line."""


@dataclass(frozen=True)
class Shape:
    """The shape of the model; about 13 million parameters."""

    vocab: int = 4096
    hidden: int = 384
    ffn: int = 1344
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    rope_theta: float = 10_000.0
    eps: float = 1e-5

    def config(self, activation: str) -> dict[str, object]:
        """``config.json`` of the model."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": activation,
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": self.context, "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
            "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02, "use_cache": True, "dtype": "bfloat16",
        }  # fmt: skip


# ----------------------------------------------------------------------------------------------- the model


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over the two halves of each head, as transformers lays them out."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention with fewer key/value heads than query heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        groups = self.shape.heads // self.shape.kv_heads
        q = self.q_proj(x).view(batch, length, self.shape.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.shape.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.shape.kv_heads, -1).transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """The gated feed-forward network; returns the gate's activation too."""

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)
        self.act = F.relu if activation == "relu" else F.silu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.act(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x)), gate


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape, activation)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)


class Body(nn.Module):
    """Everything under the name ``model`` in transformers."""

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, activation) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)


class Llama(nn.Module):
    """The language model, with the parameter names of ``LlamaForCausalLM``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, activation: str) -> None:
        super().__init__()
        self.shape, self.activation = shape, activation
        self.low_precision = False
        self.model = Body(shape, activation)
        inverse = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context).float(), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits; mean absolute gate activation of each layer; share of exact zeros among them."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(ids)
        if self.low_precision:
            x = x.to(torch.bfloat16)
        magnitudes, zeros = [], []
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin)
            y, gate = layer.mlp(layer.post_attention_layernorm(x))
            x = x + y
            if self.activation == "relu":
                magnitudes.append(gate.float().mean())
                zeros.append((gate.detach() == 0).float().mean())
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        empty = logits.new_zeros(())
        return (logits, torch.stack(magnitudes) if magnitudes else empty, torch.stack(zeros) if zeros else empty)


class Objective(nn.Module):
    """The loss: cross entropy, and for relu the weighted L1 penalty."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Total loss, cross entropy, share of zeros by layer."""
        logits, magnitudes, zeros = self.model(ids)
        entropy = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)
        total = entropy + (weights * magnitudes).sum() if self.model.activation == "relu" else entropy
        return total, entropy.detach(), zeros


# ----------------------------------------------------------------------------------------------- optimisers


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


# ----------------------------------------------------------------------------------------------- the text


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    """The training documents of a text folder."""
    for name in ("train.jsonl.xz", "train.jsonl"):
        path = folder / name
        if path.exists():
            opener = lzma.open if name.endswith("xz") else open
            with opener(path, "rt", encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)
            return
    raise RecipeError(f"{folder} holds neither train.jsonl.xz nor tokens; build_text.py --cache writes it")


def prepare(folder: Path, out: Path, vocab: int) -> None:
    """Train the tokenizer on an equal share of each domain (not of the text that is only trained on) and encode the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    out.mkdir(parents=True, exist_ok=True)
    rows = list(documents(folder))
    # Twice the rendered Rust documentation: there is less of it than of the others.
    rows += [row for row in rows if row["domain"] == "rustdoc"]
    random.Random(0).shuffle(rows)
    used = dict.fromkeys(DOMAINS, 0)
    sample = []
    for row in rows:
        if not row.get("more") and used.get(row["domain"], 0) < 10_000_000:
            used[row["domain"]] = used.get(row["domain"], 0) + len(row["text"])
            sample.append(row["text"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens: list[np.ndarray] = []
    size = 0
    for first in range(0, len(rows), 512):
        texts = [row["text"] for row in rows[first : first + 512]]
        size += sum(len(text.encode()) for text in texts)
        for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            tokens.append(np.array([0, *encoded.ids], dtype=np.uint16))
    flat = np.concatenate(tokens)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 1, "lp": 1, "pb": 1}]
    with lzma.open(out / "tokens.u16.xz", "wb", format=lzma.FORMAT_XZ, filters=filters) as file:
        file.write(flat.astype("<u2").tobytes())
    info = {"documents": len(rows), "bytes": size, "tokens": int(flat.size), "bytes_per_token": size / flat.size}
    (out / "tokens.json").write_text(json.dumps(info, indent=1) + "\n")
    print(json.dumps(info), flush=True)


class Batches:
    """Batches of consecutive tokens: every epoch a new offset and a new order."""

    def __init__(self, tokens: np.ndarray, rows: int, length: int, seed: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int16 if tokens.max() < 2**15 else np.int32)).to(device)
        self.rows, self.length, self.device = rows, length, device
        self.random = np.random.default_rng(seed)
        self.order = np.zeros(0, dtype=np.int64)
        self.span = torch.arange(length + 1, device=device)
        self.epochs = 0

    def next(self) -> Tensor:
        """Rows of ``length + 1`` tokens."""
        while len(self.order) < self.rows:
            offset = int(self.random.integers(self.length))
            count = (len(self.tokens) - offset - 1) // self.length
            if count < 1:
                raise RecipeError("the training text is shorter than one sequence")
            fresh = self.random.permutation(count) * self.length + offset
            self.order = np.concatenate([self.order, fresh])
            self.epochs += 1
        starts, self.order = self.order[: self.rows], self.order[self.rows :]
        where = torch.from_numpy(starts).to(self.device, non_blocking=True)[:, None] + self.span
        return self.tokens[where].long()


# ----------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace, shape: Shape, folder: Path, began: float) -> tuple[Llama, dict[str, object]]:
    """The training loop; ``began`` is when the budget started to run."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.manual_seed(args.seed)
    with lzma.open(folder / "tokens.u16.xz") as file:
        tokens = np.frombuffer(file.read(), dtype="<u2")
    model = Llama(shape, args.activation).to(device)
    model.low_precision = cuda or args.autocast
    objective: nn.Module = Objective(model)
    batches = Batches(tokens, args.batch, shape.context, args.seed, device)
    named = dict(model.named_parameters())
    matrices = [w for n, w in named.items() if w.dim() == 2 and "embed" not in n]
    vectors = [w for n, w in named.items() if w.dim() == 1]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        [{"params": [model.model.embed_tokens.weight], "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.rate, betas=(0.9, 0.95), eps=1e-10, fused=cuda,
    )  # fmt: skip
    controller = Controller(shape.layers, args.sparsity, device)
    if not args.no_compile and (cuda or args.autocast):
        torch.set_float32_matmul_precision("high")
        objective = torch.compile(objective, dynamic=False)
        muon.orthogonal = torch.compile(orthogonal, dynamic=False)
    noise = torch.Generator(device=device).manual_seed(args.seed)
    noisy = args.batch // 64 if args.activation == "relu" else 0
    history: list[dict[str, object]] = []
    step, progress, pace, seen = 0, 0.0, 1e-4, 0
    losses: list[Tensor] = []
    if not args.max_steps:
        # Compile first; the schedule spans what is left of the budget.
        ids = batches.next()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.low_precision):
            objective(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), controller.weights)[0].backward()
        muon.step(0.0)
        for buffer in muon.buffers:
            buffer.zero_()
        for weight in named.values():
            weight.grad = None
        if cuda:
            torch.cuda.synchronize()
    compiled = time.monotonic() - began
    print(json.dumps({"training_starts_after_seconds": round(compiled, 1)}), flush=True)
    while True:
        ids = batches.next()
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if noisy:
            # A few rows of random tokens carry the penalty but no cross entropy: sparse on odd text, too.
            top = shape.vocab if step % 2 else 257
            inputs[:noisy] = torch.randint(1, top, (noisy, shape.context), generator=noise, device=device)
            targets[:noisy] = -100
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.low_precision):
            total, entropy, zeros = objective(inputs, targets, controller.weights)
        total.backward()
        warm = min(1.0, (step + 1) / 100)
        rate = args.rate * warm * min(1.0, max((1.0 - progress) / 0.6, 0.0))
        muon.step(rate)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        for weight in named.values():
            weight.grad = None
        if args.activation == "relu":
            controller.update(zeros, progress, pace)
        losses.append(entropy)
        step += 1
        seen += int(targets.numel()) - noisy * shape.context
        if step % 8 == 0 or args.max_steps:
            if cuda:
                torch.cuda.synchronize()
            elapsed = time.monotonic() - began
            before = progress
            span = max(args.seconds - compiled, 1.0)
            progress = step / args.max_steps if args.max_steps else (elapsed - compiled) / span
            pace = (progress - before) / (1 if args.max_steps else 8) if step > 16 else pace
        if progress >= 1.0 or step % args.log_every == 0:
            record = {
                "step": step, "progress": round(progress, 4), "seconds": round(time.monotonic() - began, 1),
                "tokens": seen, "loss": round(float(torch.stack(losses).mean()), 4), "rate": round(rate, 6),
            }  # fmt: skip
            losses.clear()
            if args.activation == "relu":
                record["sparsity"] = [round(v, 4) for v in controller.smooth.tolist()]
                record["penalty"] = [float(f"{v:.3g}") for v in controller.weights.tolist()]
            history.append(record)
            print(json.dumps(record), flush=True)
        if progress >= 1.0:
            break
    summary = {
        "activation": args.activation, "seed": args.seed, "budget_seconds": args.seconds, "steps": step,
        "batch_tokens": args.batch * shape.context, "tokens_seen": seen, "epochs": round(seen / len(tokens), 2),
        "training_tokens": len(tokens), "parameters": sum(w.numel() for w in named.values()),
        "final_training_loss": history[-1]["loss"], "learning_rate": args.rate, "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if cuda else "none", "history": history[:: max(1, len(history) // 40)],
    }  # fmt: skip
    return model, summary


# ----------------------------------------------------------------------------------------------- saving and checking


def save(model: Llama, folder: Path, out: Path) -> None:
    """Round the weights to bfloat16 in place and write the Hugging Face folder."""
    from safetensors.torch import save_file

    model.low_precision = False
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())
    state = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})

    def dump(name: str, value: dict[str, object]) -> None:
        (out / name).write_text(json.dumps(value, indent=1) + "\n")

    dump("config.json", model.shape.config(model.activation))
    dump("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False})
    dump("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT, "model_max_length": model.shape.context, "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())


def check(model: Llama, out: Path, text: list[str]) -> dict[str, float]:
    """Open the saved folder with transformers and assert that it scores as the training code does."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = next(model.parameters()).device
    torch.set_float32_matmul_precision("highest")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    plain = Tokenizer.from_file(str(out / "tokenizer.json"))
    worst, sums, count = 0.0, [0.0, 0.0], 0
    with torch.no_grad():
        for document in text:
            ids = tokenizer(document)["input_ids"]
            assert ids == plain.encode(document).ids, "the tokenizer of the saved folder differs"
            ids = torch.tensor([ids[: model.shape.context]], device=device)
            ours, other = model(ids)[0], theirs(ids).logits
            worst = max(worst, float((ours - other).abs().max()))
            for index, logits in enumerate((ours, other)):
                sums[index] += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    result = {
        "max_logit_difference": worst, "perplexity_training_code": math.exp(sums[0] / count),
        "perplexity_transformers": math.exp(sums[1] / count),
    }  # fmt: skip
    assert worst < 1e-3, f"transformers gives other logits: {worst}"
    assert abs(sums[0] - sums[1]) / count < 1e-5, f"transformers gives another perplexity: {result}"
    return result


def main() -> int:
    """Command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--activation", choices=("silu", "relu"), help="silu makes swiglu, relu makes reglu")
    parser.add_argument("--text", type=Path, required=True, help="folder of build_text.py, or of --prepare-only")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model (or of the tokens)")
    parser.add_argument("--seconds", type=float, default=450.0, help="time budget, compilation included (default 450)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsity", type=float, default=0.91, help="relu: share of zeros aimed at in every layer")
    parser.add_argument("--batch", type=int, default=64, help="sequences of 1024 tokens in a batch (default 64)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default 0.003)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check-text", type=Path, default=HERE / "text" / "evaluation.jsonl",
                        help="held-out text for the check after saving")  # fmt: skip
    parser.add_argument("--prepare-only", action="store_true", help="write the tokenizer and the tokens, then stop")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast off the GPU, too")
    parser.add_argument("--max-steps", type=int, default=0, help="count steps instead of seconds (for tests)")
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    try:
        if args.seconds <= 0 or args.batch < 1:
            raise RecipeError("--seconds and --batch must be positive")
        shape = Shape()
        folder = args.text
        if args.prepare_only:
            prepare(args.text, args.out, shape.vocab)
            return 0
        if args.activation is None:
            raise RecipeError("--activation is needed: silu or relu")
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise RecipeError("no CUDA GPU found; --device cpu runs, far too slowly to train")
        if not args.check_text.exists():
            raise RecipeError(f"no such file: {args.check_text}")
        if not (folder / "tokens.u16.xz").exists():
            folder = args.text / "tokens"
            if not (folder / "tokens.u16.xz").exists():
                prepare(args.text, folder, shape.vocab)
                began = time.monotonic()
        random.seed(args.seed)
        model, summary = train(args, shape, folder, began)
        save(model, folder, args.out)
        text = [json.loads(line)["text"] for line in args.check_text.open(encoding="utf-8")]
        summary["check"] = check(model, args.out, text[:64])
        summary["total_seconds"] = round(time.monotonic() - began, 1)
        (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(json.dumps({k: v for k, v in summary.items() if k != "history"}, indent=1))
    except (RecipeError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
