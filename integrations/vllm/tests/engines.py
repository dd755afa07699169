"""Engines one after the other in one process, a few prompts each, greedy: full-vocabulary logits of every step, as files.

    python engines.py SPECIFICATIONS.json

A list of ``engine`` (arguments of vllm.LLM), ``prompts`` (lists of token ids), ``steps`` and ``result`` (a file to write).
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    for specification in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        torch.save(run(specification), specification["result"])


def run(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and logits [steps, vocabulary] of each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(max_logprobs=-1, logprobs_mode="raw_logits", **specification["engine"])
    sampling = SamplingParams(
        temperature=0, max_tokens=specification["steps"], logprobs=-1, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in specification["prompts"]]
    results = []
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        made = output.outputs[0]
        logits = [[step[token].logprob for token in range(len(step))] for step in made.logprobs]
        results.append({"tokens": list(made.token_ids), "logits": torch.tensor(logits)})
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return results


if __name__ == "__main__":
    main()
