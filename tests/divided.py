"""One of several processes that hold a model together, under ``torchrun``: logits under each plan, and after restoring.

torchrun --nproc-per-node 2 tests/divided.py DEVICE FOLDER...

A folder holds ``model``, ``tokens`` and plans in ``plans``; it gets ``result``, a dict by the plans' names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import actsparse
from actsparse.kernels.parallel import local
from actsparse.models.caches import cache_argument, cache_of


def main() -> None:
    device, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for folder in folders:
        made = logits_of(Path(folder), device)
        if dist.get_rank() == 0:
            torch.save(made, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()


def logits_of(folder: Path, device: str) -> dict[str, object]:
    tokens = torch.load(folder / "tokens").to(device)
    size = int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, distributed_config=DistributedConfig(tp_size=size)
    )
    made: dict[str, object] = {}
    before = [local(parameter).clone() for parameter in model.parameters()]
    with torch.inference_mode():
        made["dense"] = model(tokens).logits.cpu()
        for plan in sorted((folder / "plans").iterdir()):
            try:
                actsparse.sparsify(model, plan)
            except ValueError as error:
                made[plan.name] = str(error)
                continue
            # A prompt, masked; and each last token alone, which the kernels take.
            whole = model(tokens).logits.cpu()
            cache = cache_of(model(tokens[:, :-1], use_cache=True))
            made[plan.name] = whole
            step = model(tokens[:, -1:], **cache_argument(type(model).forward, cache))
            made[f"{plan.name} step"] = step.logits.cpu()
        actsparse.restore(model)
        after = [local(parameter) for parameter in model.parameters()]
        made["restored"] = all(
            torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(before, after, strict=True)
        )
    return made


if __name__ == "__main__":
    main()
