"""``AutoModelForCausalLM.from_pretrained`` of this package's directories: registered with transformers as a quantizer.

The quantizer is there while a model is being opened.  What comes out is what :func:`actsparse.sparsify` and
:func:`actsparse.runtime.packed.open_packed` make of it, and carries no quantizer: neither is a model of ``from_pretrained``
with another interface than theirs, nor is a dense one with a plan refused what transformers refuses quantized ones.

Importing this file registers; :mod:`.registration` does it, while transformers itself is being imported.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from actsparse.models import directory
from actsparse.models.directory import PLAN, QUANT_METHOD
from actsparse.models.sites import ModelError
from actsparse.plan import PlanError

_FACTS = ("format_version", "method", "sparsity", "scope", "bits_stored", "shards", "dtype")


@register_quantization_config(QUANT_METHOD)
class ActsparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a directory; or of a dense checkpoint that is to be opened under a plan.

    Args:
        plan: the plan's file: in a directory its name, otherwise any path.
        facts: what else a directory's ``config.json`` says, see :mod:`actsparse.models.directory`.
    """

    def __init__(self, plan: str | os.PathLike[str] = PLAN, **facts: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.plan = os.fspath(plan)
        for name in _FACTS:
            if facts.get(name) is not None:
                setattr(self, name, facts[name])


@register_quantizer(QUANT_METHOD)
class ActsparseQuantizer(HfQuantizer):
    """Sparsifies a model when its weights are there; packed matrices it reads itself."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._files: list[Path] = []

    @property
    def _packed(self) -> bool:
        return directory.holds_packed(self.quantization_config.to_dict())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return not self._packed

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> Any:
        self._files = [Path(file) for file in checkpoint_files or []]
        if not self._files:
            raise ModelError("a state dict was given, expected a directory: a plan belongs to the weights of one")
        if not self.pre_quantized:
            return model
        home = self._files[0].parent
        opened = Path(os.path.normpath(model.config.name_or_path))
        outside = opened.is_dir() and not Path(os.path.normpath(home)).is_relative_to(opened)
        if outside or any(file.parent != home for file in self._files):
            raise ModelError(f"{home} has an index of files that lie elsewhere, expected them inside")
        directory.check(home, self.quantization_config.to_dict())
        if self._packed:
            from actsparse.runtime.packed import PARTS, await_packed

            names = "|".join(re.escape(name) for name in await_packed(model, self._files))
            parts = "|".join(PARTS)
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {rf"^(?:{names})\.(?:{parts})$"}
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        from actsparse.plan import Plan
        from actsparse.runtime.packed import fill_awaited
        from actsparse.runtime.swap import sparsify

        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1 or "meta" in devices:
            where = ", ".join(sorted(devices)).replace("meta", "disk")
            raise ModelError(f"the model was spread over {where}, expected one device: another device_map")
        self.remove_quantization_config(model)
        for module in model.modules():
            config = getattr(module, "config", None)
            for name in ("_is_quantized", "auto_map"):
                if config is not None and name in vars(config):
                    delattr(config, name)
        path = self._files[0].parent / PLAN if self.pre_quantized else Path(self.quantization_config.plan)
        if self._packed:
            if devices != {"cpu"}:
                raise ModelError(f"the model is on {devices.pop()}, its weights are packed: expected cpu")
            plan = Plan.load(_fetched(path))
            fill_awaited(model, self._files, plan)
        else:
            plan = Plan.load(_fetched(path))
        return sparsify(model, plan)


def _fetched(path: Path) -> Path:
    """``path``, brought into the hub's cache if it belongs to a snapshot there: only weights are fetched by themselves."""
    home = path.parent
    if path.exists() or home.parent.name != "snapshots":
        return path
    from huggingface_hub import hf_hub_download

    repository = home.parent.parent.name.removeprefix("models--").replace("--", "/")
    try:
        return Path(hf_hub_download(repository, path.name, revision=home.name, cache_dir=home.parent.parent.parent))
    except Exception as error:  # the hub client raises many unrelated kinds
        raise PlanError(f"plan {path.name} of {repository} cannot be fetched: {error}") from None
