"""Small models with exact zeros, plans of them, and the paper's search of thresholds written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CONFIG_MAPPING, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from actsparse.calibration.collect import Calibration
from actsparse.methods import make
from actsparse.methods.base import Targets
from actsparse.models.text import Windows
from actsparse.plan import Plan


def windows(tokens: int = 1024, window: int = 64, seed: int = 0) -> Windows:
    """Random token windows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4096, (tokens // window, window), generator=generator)
    return Windows(ids, "random", ("",) * len(ids))


def drelu_model(seed: int = 0) -> Any:
    """A small model with ReLU on gate and up, of the family that TurboSparse's configuration names."""

    class Mlp(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.act_fn = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))

    torch.manual_seed(seed)
    config = MistralConfig(
        hidden_size=48,
        intermediate_size=132,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=4096,
        hidden_act="relu",
        initializer_range=0.15,
        max_position_embeddings=256,
    )
    model = MistralForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp = Mlp(layer.mlp)
    config.model_type = "bamboo"
    return model


def opt_model(seed: int = 0) -> Any:
    """A small plain-ReLU model with biases."""
    torch.manual_seed(seed)
    config = OPTConfig(
        hidden_size=48,
        ffn_dim=132,
        num_hidden_layers=2,
        num_attention_heads=6,
        vocab_size=4096,
        max_position_embeddings=256,
        word_embed_proj_dim=48,
        init_std=0.15,
    )
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.fc1.bias.normal_(-0.3, 0.3)
            layer.fc2.bias.normal_(0, 0.3)
    return model


def relu_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small ReGLU model."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](
        hidden_size=48,
        intermediate_size=132,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=4096,
        hidden_act=changes.pop("hidden_act", "relu"),
        initializer_range=0.15,
        max_position_embeddings=256,
        **changes,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "reglu": relu_model,
    "relu2": lambda: relu_model(hidden_act="relu2"),
    "biased": lambda: relu_model(mlp_bias=True),
    "drelu": drelu_model,
    "opt": opt_model,
}


def plan_of(model: Any, method: str = "svdp", target: float = 0.5, **settings: Any) -> Plan:
    """A plan made from random tokens."""
    chosen = make(method, **settings)
    run = Calibration(model, windows(), [chosen])
    return run.solve(chosen, run.collect()[method], Targets(target))


def greedy_one_by_one(loss: torch.Tensor, start: torch.Tensor, steps: int, most_off: float) -> torch.Tensor:
    """The paper's search as it is told: one neuron, one step at a time."""
    place, last = start.numpy().copy(), loss.shape[1] - 1
    ahead = np.concatenate([np.diff(loss.numpy(), axis=1), np.full((len(place), 1), np.inf)], axis=1)
    costs = ahead[np.arange(len(place)), place]
    for _ in range(steps):
        best = int(costs.argmin())
        if costs[best] == np.inf:
            break
        place[best] += 1
        costs[best] = ahead[best, place[best]]
        if (place == last).sum() > most_off:
            break
    return torch.from_numpy(place)
