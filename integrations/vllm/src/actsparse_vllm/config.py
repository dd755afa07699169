"""The quantisation method ``actsparse``: which plan, for which layers, and what is refused.

``quantization_config`` (of ``--hf-overrides``, or of a directory's config.json) holds::

    quant_method   "actsparse"
    plan           path of the plan, relative to the working directory or to the model's; a packed directory's is its own
    scope          "all", for a plan that was made for other tokens

Everything that can be refused is refused where the engine is configured, before a weight is read.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from actsparse.models import directory, sites
from actsparse.plan import Plan, PlanError
from actsparse_vllm import identity
from actsparse_vllm.linear import SparseLinearMethod
from actsparse_vllm.models import ARCHITECTURE
from actsparse_vllm.packed import PackedLinearMethod

logger = logging.getLogger("vllm.actsparse")

NAME = directory.QUANT_METHOD
PACKED_FORMATS = (1, 2)
# What a layer of vLLM multiplies, in the order in which it is merged, by the last part of its name.
MERGED = {
    "qkv_proj": ("q", "k", "v"),
    "gate_up_proj": ("gate", "up"),
    "o_proj": ("o",),
    "out_proj": ("o",),
    "down_proj": ("down",),
    "fc1": ("up",),
    "fc2": ("down",),
}
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\..*?([^.]+)$")
# A plan lies beside a packed directory's weights, and vLLM reads every file of that kind.
_RULES = re.compile(r"^(?:layers\.\d+\.\w+|head)\.(?:threshold|level_threshold|center|predictor_\w+)$")


@register_quantization_config(NAME)
class ActsparseConfig(QuantizationConfig):
    """A plan and the form of the weights; see the module."""

    def __init__(self, plan: str | None, scope: str | None, packed: dict[str, Any] | None) -> None:
        super().__init__()
        self._path, self._scope, self._packed = plan, scope, packed
        self._plan: Plan | None = None
        self._claimed: dict[int, set[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Other processes read the plan's file themselves: predictors are too large to be sent around.
        return {**self.__dict__, "_plan": None}

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        base = QuantizationConfig.get_checkpoint_weight_mapper()
        return base | WeightsMapper(orig_to_new_regex={_RULES: None})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ActsparseConfig:
        packed = directory.holds_packed(config)
        plan = config.get("plan", directory.PLAN if packed else None)
        if not isinstance(plan, str) or not plan:
            raise PlanError(
                f'quantization_config has plan {plan!r}, expected {{"quant_method": "{NAME}", "plan": PATH}}'
            )
        if packed and config.get("format_version") not in PACKED_FORMATS:
            raise PlanError(f"packed format is {config.get('format_version')!r}, expected 1 or 2")
        return cls(plan, config.get("scope"), dict(config) if packed else None)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the plan, and raise PlanError unless it can be obeyed and is for this model."""
        path = Path(self._path or "")
        if not path.is_file() and (Path(model_name) / path).is_file():
            path = Path(model_name) / path
        self._path = str(path.resolve())
        plan = self.plan
        packed = self._packed is not None
        graded = any(name.endswith(".level_threshold") for name in plan.rules)
        if graded and not packed:
            raise PlanError(f"plan's method is {plan.method}: it needs packed weights, made by `actsparse pack`")
        if getattr(hf_config, "hidden_act", None) == "relu" and "LlamaForCausalLM" in (hf_config.architectures or []):
            raise PlanError(
                f'hidden_act is \'relu\', which vLLM\'s Llama refuses: add "architectures": ["{ARCHITECTURE}"] '
                "to --hf-overrides"
            )
        plan.check_model(identity.of(model_name, hf_config, plan if packed else None))
        logger.info("actsparse: %s, sparsity %.2f, plan %s", plan.method, plan.sparsity, self._path)

    @property
    def plan(self) -> Plan:
        """The plan, under the scope that is asked for."""
        if self._plan is None:
            plan = Plan.load(self._path or "")
            if self._scope is not None:
                plan = plan.with_scope(str(self._scope))
            _check(plan)
            self._plan = plan
        return self._plan

    @property
    def gated(self) -> bool:
        """Whether the model's blocks have a gate."""
        return sites.FAMILIES.get(self.plan.model.family, sites.Family()).gated

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            return PackedLinearMethod(self.plan, "head", ("head",)) if self._packed is not None else None
        if not isinstance(layer, LinearBase):
            return None
        place = _PLACE.search(prefix)
        names = MERGED.get(place[2]) if place else None
        if place is None or names is None:
            return UnquantizedLinearMethod()
        index = int(place[1])
        self._claimed.setdefault(index, set()).update(names)
        if self._packed is not None:
            return PackedLinearMethod(self.plan, f"layers.{index}", names)
        return SparseLinearMethod(self, index, names)

    def check_claimed(self) -> None:
        """PlanError unless the layers that this process holds have a product for each of their rules."""
        if not self._claimed:
            raise PlanError("the model has no layers that vLLM merges the usual way (qkv_proj, gate_up_proj, ...)")
        for index, names in self._claimed.items():
            for rule in self.plan.layer_rules(index):
                site = rule.partition(".")[0]
                if site not in names and not (site == "ffn" and {"up", "down"} <= names):
                    raise PlanError(f"plan has layers.{index}.{rule}, the layer has no such projection in vLLM")
                if site == "ffn" and not self.gated and rule != "ffn.threshold":
                    raise PlanError(f"plan has layers.{index}.{rule}: blocks without a gate take thresholds in vLLM")


def announce() -> None:
    """Say that the plug-in is there: vLLM only logs it when it is not."""
    logger.debug("actsparse: quantisation method %s registered", NAME)


def _check(plan: Plan) -> None:
    """PlanError for a plan that an engine with mixed batches cannot obey."""
    plan.check_decodable()
    if plan.prompt:
        raise PlanError(f"plan's method is {plan.method}: it chooses neurons per prompt, vLLM batches many prompts")
    if plan.scope != "all":
        raise PlanError(
            f"plan's scope is {plan.scope!r}, expected 'all': vLLM mixes prompts and decoding in one batch "
            '(add "scope": "all" to quantization_config)'
        )
