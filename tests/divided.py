"""One of several processes that hold a model together, under ``torchrun``: logits under each plan, and after restoring.

torchrun --nproc-per-node 2 tests/divided.py MODEL RESULT.pt DEVICE PLAN...
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import actsparse
from actsparse.kernels.parallel import local
from actsparse.models.caches import cache_argument, cache_of


def main() -> None:
    name, result, device, *plans = sys.argv[1:]
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    tokens = torch.load(f"{result}.tokens").to(device)
    size = int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=size)
    )
    made: dict[str, object] = {}
    before = [local(parameter).clone() for parameter in model.parameters()]
    with torch.inference_mode():
        made["dense"] = model(tokens).logits.cpu()
        for plan in plans:
            try:
                actsparse.sparsify(model, plan)
            except ValueError as error:
                made[plan] = str(error)
                continue
            # A prompt, masked; and each last token alone, which the kernels take.
            whole = model(tokens).logits.cpu()
            cache = cache_of(model(tokens[:, :-1], use_cache=True))
            made[plan] = whole
            made[f"{plan} step"] = model(tokens[:, -1:], **cache_argument(type(model).forward, cache)).logits.cpu()
        actsparse.restore(model)
        after = [local(parameter) for parameter in model.parameters()]
        made["restored"] = all(
            torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(before, after, strict=True)
        )
    if dist.get_rank() == 0:
        torch.save(made, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
