"""How much of the weights a batch reads when every sequence keeps other channels: the union against the batch size.

    python benchmarks/union.py reference/swiglu PLAN --text reference/text/evaluation.jsonl

Tokens of different windows stand for sequences that decode at the same time. For each batch size B, the share of the channels
that at least one of B tokens keeps, averaged over sites and over draws; at B = 1 that is what one sequence reads.
"""

from __future__ import annotations

import argparse

import torch

import actsparse
from actsparse.kernels import reference
from actsparse.models.text import load_windows
from actsparse.runtime.layers import SparseFFN, SparseLinear

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DRAWS = 50


def main() -> None:
    """Print one line a batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("plan")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    model, tokenizer = actsparse.load(options.model, options.plan, scope="all")
    windows = load_windows(options.text, tokenizer, tokens=options.tokens, window=128)
    masks: dict[str, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, SparseLinear | SparseFFN):
            module.register_forward_pre_hook(lambda module, args: observe(module, args[0], masks))
    with torch.inference_mode():
        for row in windows.tokens:
            model(row[None])
    generator = torch.Generator().manual_seed(1)
    kept = {site: torch.stack(rows) for site, rows in masks.items()}  # [windows, T, channels]
    print("batch", *BATCHES)
    for kind in sorted({site.rpartition(".")[2] for site in kept}):
        shares = []
        for batch in BATCHES:
            found = [
                draw(mask, batch, generator)
                for site, mask in kept.items()
                if site.endswith(f".{kind}")
                for _ in range(DRAWS)
            ]
            shares.append(sum(found) / len(found))
        print(kind, *(f"{share:.3f}" for share in shares))


def observe(module: SparseLinear | SparseFFN, x: torch.Tensor, masks: dict[str, list[torch.Tensor]]) -> None:
    """Note who is kept at this module's sites."""
    x = x.reshape(-1, x.shape[-1])
    if isinstance(module, SparseLinear):
        masks.setdefault(module.site, []).append(reference.keep(x, module.threshold))
        return
    gate, up = (module.projection(name).weight for name in ("gate", "up"))
    for name, mask in reference.ffn_keep(x, gate, up, module.rules()).items():
        masks.setdefault(f"{module.site}.{name}", []).append(mask)


def draw(kept: torch.Tensor, batch: int, generator: torch.Generator) -> float:
    """The share of channels that any of ``batch`` random tokens keeps, each of another window where there are enough."""
    windows, tokens, _ = kept.shape
    rows = torch.randperm(windows, generator=generator)[:batch]
    places = torch.randint(tokens, (len(rows),), generator=generator)
    return float(kept[rows, places].any(0).float().mean())


if __name__ == "__main__":
    main()
