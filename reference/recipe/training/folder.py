"""The Hugging Face folder of a trained model: writing it, and checking it with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from .model import Llama
from .tokens import END_OF_TEXT


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
