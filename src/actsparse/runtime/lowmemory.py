"""Low memory: feed-forward weights stay in their file, and only the neurons that a prompt chose become resident.

The checkpoint's safetensors files are mapped, not read.  Everything outside the feed-forward blocks is copied as usual;
a block's weights are views of the mapping, so that a prompt's dense pass pages them in layer by layer and they are let go
of again right after (``madvise``).  What stays is what decoding reads: contiguous copies of the chosen rows and columns.

Pages of a mapping belong to the kernel's page cache: they are fast while there is memory to spare and never count as the
process's own.  Every new text reads the blocks again.

On a GPU the same holds of the card's memory: :func:`actsparse.runtime.swap.sparsify` takes the blocks that obey the plan into
the host's pinned memory (:mod:`actsparse.runtime.host`) and the others onto the card.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from actsparse.models import opening, sites
from actsparse.models.directory import PLAN
from actsparse.models.sites import ModelError
from actsparse.plan import one_line

_ATTRIBUTE = "actsparse_mapped"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class MappedWeights:
    """The tensors of a checkpoint's safetensors files as views of memory mappings.

    Args:
        directory: the checkpoint.

    Raises:
        ModelError: no safetensors files, a damaged header, or a type that is not float32, bfloat16 or float16.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        # Where the rest of the model is, when that is not the CPU.
        self.card: torch.device | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[int, tuple[mmap.mmap, int, int]] = {}
        files = sorted(file for file in Path(directory).glob("*.safetensors") if file.name != PLAN)
        if not files:
            raise ModelError(f"model {directory} has no .safetensors file: the low-memory mode maps one")
        for file in files:
            self._map(file)

    def releaser(self, weights: Sequence[torch.Tensor]) -> Callable[[], None]:
        """A function that gives the pages of ``weights`` back; their values are read again when next used."""
        places = [self._places[weight.data_ptr()] for weight in weights if weight.data_ptr() in self._places]

        def release() -> None:
            for mapping, start, size in places:
                # Whole pages: a neighbour's bytes in the first or last one are read again as well.
                begin = start - start % mmap.PAGESIZE
                mapping.madvise(mmap.MADV_DONTNEED, begin, start + size - begin)

        return release

    def _map(self, file: Path) -> None:
        try:
            with file.open("rb") as opened:
                # Copy-on-write, because torch wants memory that it could write to; nothing does.
                mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            header_size = int.from_bytes(mapping[:8], "little")
            header = json.loads(mapping[8 : 8 + header_size])
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
                if entry["dtype"] not in _DTYPES:
                    raise ModelError(f"{file} stores {name} as {entry['dtype']}, expected {', '.join(_DTYPES)}")
                dtype = _DTYPES[entry["dtype"]]
                count = (end - begin) // dtype.itemsize
                tensor = torch.frombuffer(mapping, dtype=dtype, count=count, offset=begin).view(entry["shape"])
                self.tensors[name] = tensor
                self._places[tensor.data_ptr()] = (mapping, begin, end - begin)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{file} is not a sound safetensors file: {error}") from None


def mapped_weights(model: Any) -> MappedWeights | None:
    """The mappings behind ``model``, None when it was opened the usual way."""
    return getattr(model, _ATTRIBUTE, None)


def open_mapped(directory: str, *, device: str = "cpu", everything: bool = False) -> Any:
    """The causal language model in ``directory``, its feed-forward weights mapped instead of read, the rest on ``device``.

    With ``everything`` all of its weights are mapped, for a caller that goes through them once.

    Sparsified with a plan that chooses neurons per prompt, it decodes with only the chosen neurons resident.  On a GPU it
    computes only once it is sparsified.

    Raises:
        ModelError: no such device, not a directory, an unsupported family, no safetensors files, or tensors missing from them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(directory) / "config.json").is_file():
        raise ModelError(f"model {directory} is no directory with a config.json: the low-memory mode needs the files")
    place = opening.device_of(device)
    mapped = MappedWeights(directory)
    mapped.card = None if place.type == "cpu" else place
    try:
        config = opening.without_plan(AutoConfig.from_pretrained(directory))
    except Exception as error:  # transformers raises many unrelated kinds
        raise ModelError(f"model {directory} has no sound config.json: {one_line(error)}") from None
    opening.check_family(config)
    dtypes = {tensor.dtype for tensor in mapped.tensors.values()}
    if not dtypes:
        raise ModelError(f"model {directory} stores no tensors, expected those of its config.json")
    if len(dtypes) > 1:
        raise ModelError(f"{directory} stores {len(dtypes)} types of weights, the low-memory mode expects one")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtypes.pop())
    family = sites.family_of(model)
    if not family.has_ffn:
        raise ModelError(f"{config.model_type} models cannot be packed, nor decoded in low memory: {family.notes}")
    in_place = {family.stored(name).split(".")[-1] for name, _ in family.projections if name in sites.FFN_PROJECTIONS}
    state = {}
    for name, tensor in mapped.tensors.items():
        if everything or (name.endswith(".weight") and name.split(".")[-2] in in_place):
            state[name] = tensor
        else:
            state[name] = tensor.clone() if mapped.card is None else tensor.to(place)
            mapped.releaser([tensor])()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    opening.check_complete(
        directory, [], [name for name in state if name in shapes and state[name].shape != shapes[name]]
    )
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    opening.check_complete(directory, empty, [])
    if unexpected:
        raise ModelError(f"model {directory} holds {unexpected[0]}, expected only tensors of its config.json")
    opening.materialise_buffers(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(place))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    setattr(model, _ATTRIBUTE, mapped)
    generation = Path(directory) / "generation_config.json"
    if generation.is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()
