"""Neurons chosen once per prompt: the block that obeys them, and whose they are.

A neuron set belongs to one generation, and what carries a generation in transformers is its key/value cache.  So the set
lives on the cache object: two generations that take turns on one model, or a copy of a prompt's cache that is continued
twice, cannot mix, and a set dies with its cache.  The policy:

- text that starts a cache (position 0) starts a new session; whatever was known before is not looked at;
- text is every forward of several tokens (and a first one of a single token): it runs dense and its activations are scored;
- text that arrives later in the same cache (a chat's next turn) adds to the scores, and the sets are chosen anew;
- single tokens are decoding: they run on the sets, which stay fixed.  Generated tokens are not scored;
- a cache that was cut back inside the scored text and goes on with *other* text starts a new session from that text; with
  the same tokens again (an answer is generated once more) everything stays;
- a cache that this model did not fill since it was sparsified has no sets: its decoding runs dense until text arrives.

Padding (``attention_mask``) is not scored.  Every sequence of a batch has its own sets.

Shape letters: B batch, T tokens, H hidden, N neurons, S rows of a score.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from actsparse import kernels
from actsparse.methods.prompt import Choice, PromptRule
from actsparse.models.sites import ModelError
from actsparse.runtime.layers import SparseModule

_ATTRIBUTE = "_actsparse_session"


@dataclass(frozen=True)
class Session:
    """What one generation knows of its text; never changed, only replaced, so that copies of a cache may share it.

    Attributes:
        owner: the token of the model that made it.
        scores: per sequence and layer, float32 [S, N].
        choices: per sequence.
        texts: the scored text, as (position, token ids [B, T] or None when the model was fed embeddings).
        seen: position after the last scored token.
    """

    owner: object
    scores: tuple[Mapping[int, torch.Tensor], ...]
    choices: tuple[Choice, ...]
    texts: tuple[tuple[int, torch.Tensor | None], ...]
    seen: int
    gathered: dict[tuple[int, int], Gathered] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self

    def neurons(self, layer: int, sequence: int = 0) -> torch.Tensor | None:
        """The set of one sequence at one layer, int32 ascending; None where the layer stays dense."""
        return self.choices[sequence].neurons.get(layer)


@dataclass(frozen=True)
class Gathered:
    """A layer's chosen neurons as a smaller dense block: gate and up [n, H], down [H, n] with its columns contiguous."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None


@dataclass(frozen=True)
class Operands:
    """Arguments of the FFN kernel after the activations: gate, up and down, and its options."""

    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict[str, Any]


@dataclass
class _Run:
    """One forward under way."""

    session: Session | None
    position: int
    batch: int
    ids: torch.Tensor | None
    text: bool
    # [B, T] True where a token is real; None when all are.
    real: torch.Tensor | None = None
    fresh: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class Prompts:
    """The sessions of one sparsified model: hooks around its decoder that see every forward's cache and text.

    Args:
        decoder: the model's stack of layers (``model.get_decoder()``).
        rule: how texts are scored and neurons chosen.
        gather: decode on contiguous copies of the chosen weights instead of index lists.
    """

    def __init__(self, decoder: nn.Module, rule: PromptRule, *, gather: bool = False) -> None:
        self.rule = rule
        self.gather = gather
        self.modules: list[PromptFFN] = []
        self._token = _Token()
        self._names = list(inspect.signature(decoder.forward).parameters)
        # By thread: a server may run one model from several.
        self._runs: dict[int, _Run] = {}
        self.handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def session(self, cache: Any) -> Session | None:
        """The session that lives on ``cache``, if this model made it."""
        session = getattr(cache, _ATTRIBUTE, None)
        return session if session is not None and session.owner is self._token else None

    def attach(self, cache: Any, session: Session | None) -> None:
        """Let ``cache`` go on with ``session``: for who keeps keys and values elsewhere between two forwards."""
        setattr(cache, _ATTRIBUTE, session)

    def current(self) -> _Run | None:
        """The forward under way in this thread."""
        return self._runs.get(threading.get_ident())

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, embeds, cache = (given.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        batch, tokens = (embeds if ids is None else ids).shape[:2]  # type: ignore[union-attr]
        position = int(cache.get_seq_length()) if cache is not None else 0
        session = self.session(cache) if position else None
        if session is not None and len(session.choices) != batch:
            raise ModelError(
                f"the batch has {batch} sequences, neurons were chosen for {len(session.choices)}: "
                "sequences cannot be added to or taken from a cache that chose neurons per prompt"
            )
        run = _Run(session, position, batch, ids, text=tokens > 1 or not position)
        if session is not None and any(module.scope == "all" for module in self.modules):
            # An evaluation that lets many tokens count as so many decode steps.
            run.text = False
        elif session is not None and position < session.seen:
            same = _same(session, position, ids)
            run.session = session if same else None
            run.text = not same or position + tokens > session.seen
        if run.text:
            run.real = _real(given.get("attention_mask"), batch, position, tokens)
            if run.session is not None and position < run.session.seen:
                # The beginning of this text was scored when it came first.
                new = torch.arange(position, position + tokens) >= run.session.seen
                run.real = (torch.ones(batch, tokens, dtype=torch.bool) if run.real is None else run.real.cpu()) & new
        self._runs[threading.get_ident()] = run

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = self._runs.pop(threading.get_ident(), None)
        if run is None or output is None or not run.text:
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if cache is None:
            return  # nothing will be decoded from this text
        session = self._chosen(run)
        for module in self.modules:
            module.prepare(session)
        self.attach(cache, session)

    def _chosen(self, run: _Run) -> Session:
        """The session after a text."""
        old = run.session
        scores = []
        for sequence in range(run.batch):
            fresh = {layer: rows[sequence] for layer, rows in run.fresh.items()}
            if old is not None:
                fresh = {layer: old.scores[sequence][layer] + score for layer, score in fresh.items()}
            scores.append(fresh)
        tokens = 0 if run.ids is None else run.ids.shape[1]
        texts = (*(old.texts if old is not None else ()), (run.position, None if run.ids is None else run.ids.cpu()))
        choices = tuple(self.rule.choose(score) for score in scores)
        return Session(self._token, tuple(scores), choices, texts, run.position + max(tokens, 1))


def _same(session: Session, position: int, ids: torch.Tensor | None) -> bool:
    """Whether tokens that come again, from ``position`` on, are those that were scored there."""
    if ids is None:
        return False
    for start, known in session.texts:
        if known is None:
            return False
        begin, end = max(start, position), min(start + known.shape[1], position + ids.shape[1])
        again = ids[:, begin - position : end - position].to(known.device)
        if begin < end and not torch.equal(known[:, begin - start : end - start], again):
            return False
    return True


def _real(mask: Any, batch: int, position: int, tokens: int) -> torch.Tensor | None:
    """Which of a text's tokens are no padding, bool [B, T]; None when all are.

    Args:
        mask: what the decoder was given: None, [B, keys], or [B, 1, T, keys] (a dictionary of such where layers differ).
        batch: B.
        position: of the first token.
        tokens: T.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        if batch == 1:
            return None
        raise ModelError(f"attention_mask is a {type(mask).__name__}, expected a tensor that shows the padding")
    if mask.dim() == 2:
        real = mask[:, position : position + tokens] if mask.shape[1] >= position + tokens else mask[:, -tokens:]
        real = real.bool()
    else:
        # A token that may not look at itself is padding.
        own = mask[:, 0, :, position : position + tokens].diagonal(dim1=-2, dim2=-1)
        real = own if own.dtype == torch.bool else own >= 0
    return None if bool(real.all()) else real.expand(batch, tokens)


class _Token:
    """Tells the sessions of one model from those of another, or of another plan."""


class PromptFFN(SparseModule):
    """A gated feed-forward block: text runs dense and is scored, decoding runs on the neurons that the text chose.

    Args:
        ffn: the block it replaces.
        projections: attribute name and layer of gate, up and down, as the block names them.
        layer: index of the layer.
        activation: as the kernels name it.
        prompts: the model's sessions; the block joins its modules.
        up_activation: of the up projection's values.
    """

    def __init__(
        self,
        ffn: nn.Module,
        projections: Mapping[str, tuple[str, nn.Linear]],
        layer: int,
        activation: str,
        prompts: Prompts,
        up_activation: str = "identity",
    ) -> None:
        super().__init__(f"layers.{layer}", "decode", {})
        self.layer = layer
        self.activation = activation
        self.up_activation = up_activation
        self.prompts = prompts
        # Called when a text is through this block, for weights that are mapped from a file: :mod:`actsparse.runtime.lowmemory`.
        self.release: Callable[[], None] | None = None
        self._names = {}
        for projection, (name, linear) in projections.items():
            self.add_module(name, linear)
            self._names[projection] = name
        # Not a registered child: it holds the same layers, which must appear in the state dict once.
        self._replaced = (ffn,)
        prompts.modules.append(self)

    def projection(self, name: str) -> nn.Linear:
        """The layer behind ``gate``, ``up`` or ``down``."""
        return getattr(self, self._names[name])

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return self._replaced[0](x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [B, T, H]."""
        run = self.prompts.current()
        if run is None:
            return self.dense(x)
        if run.text:
            return self._scored(x, run)
        if run.session is None or run.session.neurons(self.layer) is None:
            return self.dense(x)
        return self._decoded(x, run.session)

    def _scored(self, x: torch.Tensor, run: _Run) -> torch.Tensor:
        activate, activate_up = (kernels.reference.ACTIVATIONS[name] for name in (self.activation, self.up_activation))
        value = activate(self.projection("gate")(x)) * activate_up(self.projection("up")(x))
        with torch.no_grad():
            rows = value.detach().reshape(run.batch, -1, value.shape[-1])
            real = None if run.real is None else run.real.to(value.device)
            run.fresh[self.layer] = [
                self.prompts.rule.score(row if real is None else row[real[sequence]])
                for sequence, row in enumerate(rows)
            ]
        output = self.projection("down")(value)
        if self.release is not None:
            self.release()
        return output

    def _decoded(self, x: torch.Tensor, session: Session) -> torch.Tensor:
        # One call per sequence: a union of the sets would let a sequence use neurons that only another one chose.
        parts = []
        for sequence, row in enumerate(x):
            operands = self.operands(session, sequence)
            if self.meter is not None:
                self._count(session, sequence, row.shape[0])
            parts.append(kernels.gated_ffn(row, *operands.matrices, **operands.options))
        return torch.stack(parts)

    def _count(self, session: Session, sequence: int, tokens: int) -> None:
        neurons = session.neurons(self.layer, sequence)
        assert neurons is not None
        assert self.meter is not None
        for name in ("gate", "up", "ffn", "down"):
            self.meter.add(f"{self.site}.{name}", len(neurons) * tokens, self.projection("up").out_features * tokens)

    def operands(self, session: Session | None, sequence: int = 0) -> Operands:
        """What the FFN kernel needs to decode ``sequence``: index lists, or the copies where those are kept.

        Without a session, or where it leaves the layer dense, the whole block.
        """
        gate, up, down = (self.projection(name) for name in ("gate", "up", "down"))
        options: dict[str, Any] = {
            "activation": self.activation,
            "up_activation": self.up_activation,
            "down_bias": down.bias,
        }
        options |= {"gate_bias": gate.bias, "up_bias": up.bias}
        if session is None or session.neurons(self.layer, sequence) is None:
            return Operands((gate.weight, up.weight, down.weight), options)
        copies = session.gathered.get((self.layer, sequence))
        if copies is None and self._gathers:
            copies = session.gathered[self.layer, sequence] = self._gather(session, sequence)
        if copies is not None:
            options |= {"gate_bias": copies.gate_bias, "up_bias": copies.up_bias}
            return Operands((copies.gate, copies.up, copies.down), options)
        options["neurons"] = session.neurons(self.layer, sequence)
        return Operands((gate.weight, up.weight, down.weight), options)

    def prepare(self, session: Session) -> None:
        """Make the copies that decoding will need, if this model decodes on copies, and let go of mapped weights."""
        if self._gathers:
            for sequence in range(len(session.choices)):
                if session.neurons(self.layer, sequence) is not None:
                    session.gathered[self.layer, sequence] = self._gather(session, sequence)
        if self.release is not None:
            self.release()

    @property
    def _gathers(self) -> bool:
        # Off the CPU an index list would be gathered again at every token.
        return self.prompts.gather or self.projection("up").weight.device.type != "cpu"

    def _gather(self, session: Session, sequence: int) -> Gathered:
        gate, up, down = (self.projection(name) for name in ("gate", "up", "down"))
        neurons = session.neurons(self.layer, sequence)
        assert neurons is not None
        index = neurons.to(up.weight.device)

        def pick(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.detach().index_select(0, index)

        with torch.no_grad():
            # From the transposed view, so that the columns come out contiguous without a second copy.
            columns = down.weight.detach().t().index_select(0, index).t()
            rows = gate.weight.detach().index_select(0, index), up.weight.detach().index_select(0, index)
            return Gathered(*rows, columns, pick(gate.bias), pick(up.bias))

    def extra_repr(self) -> str:
        return f"activation={self.activation}, rule={type(self.prompts.rule).__name__}"
