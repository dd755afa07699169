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
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recipe.training.folder import check, save
from recipe.training.model import Llama, Objective, Shape
from recipe.training.optimisers import Controller, Muon, orthogonal
from recipe.training.tokens import Batches, RecipeError, prepare

HERE = Path(__file__).resolve().parent


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
