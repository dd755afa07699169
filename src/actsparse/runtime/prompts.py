"""Neurons chosen once per prompt: whose they are.  :mod:`actsparse.runtime.prompt_ffn` is the block that obeys them.

A neuron set belongs to one generation, and what carries a generation in transformers is its key/value cache.  So the set
lives on the cache object: two generations that take turns on one model, or a copy of a prompt's cache that is continued
twice, cannot mix, and a set dies with its cache.  The policy, whose aim is that what comes out depends on the text alone
and not on how its cache came about:

- text that starts a cache (position 0) starts a new session; whatever was known before is not looked at;
- text is every forward of several tokens, a first one of a single token, and whatever comes at a position inside the
  scored text: it runs dense and is scored, and the sets are chosen from all of the text;
- single tokens after the text are decoding: they run on the sets, which stay fixed;
- when text follows decoded tokens (a chat's next turn), these are text too: they are taken out of the cache and run again,
  dense, because a fresh run over the conversation would have run them so.  The same goes for a cache that was cut back to
  a place where no sums of scores are kept: what is missing since the last such place runs again;
- a decode step that finds no session, or whose cache cannot be seen, is an error, never a dense step.

Padding (``attention_mask``) is not scored.  Every sequence of a batch has its own sets.

Shape letters: B batch, T tokens, D decoded tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from actsparse.methods.prompt import PromptRule
from actsparse.models import caches
from actsparse.models.sites import ModelError
from actsparse.runtime.sessions import UNKNOWN, Kept, Session, Tally

if TYPE_CHECKING:
    from actsparse.runtime.prompt_ffn import PromptFFN

_ATTRIBUTE = "_actsparse_session"
# Arguments of a decoder that are understood, or known not to matter here. The cache is found by its type.
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"}


@dataclass
class Run:
    """One forward under way."""

    session: Session | None
    position: int
    batch: int
    ids: torch.Tensor
    text: bool
    cache: Cache | None
    # [B, T] True where a token is real; None when all are.
    real: torch.Tensor | None = None
    fresh: dict[int, list[Tally]] = field(default_factory=dict)
    # Whether the rotary embedding showed at which positions the tokens are.
    placed: bool = False


class Prompts:
    """The sessions of one sparsified model: hooks around its decoder that see every forward's cache and text.

    Args:
        decoder: the model's stack of layers (``model.get_decoder()``).
        rule: how texts are scored and neurons chosen.
        gather: decode on contiguous copies of the chosen weights instead of index lists.

    Raises:
        ModelError: the decoder has no ``rotary_emb``, which tells at which positions a forward's tokens are.
    """

    def __init__(self, decoder: nn.Module, rule: PromptRule, *, gather: bool = False) -> None:
        rotary = getattr(decoder, "rotary_emb", None)
        if not isinstance(rotary, nn.Module):
            raise ModelError(f"{type(decoder).__name__} has no module rotary_emb, expected one: it shows the positions")
        self.rule = rule
        self.gather = gather
        self.modules: list[PromptFFN] = []
        self._token = _Token()
        self._names = list(inspect.signature(decoder.forward).parameters)
        # By thread: a server may run one model from several.
        self._runs: dict[int, Run] = {}
        self.handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            rotary.register_forward_pre_hook(self._placed, with_kwargs=True),
        ]

    @property
    def stride(self) -> int:
        """Text is read so many tokens at a time by :func:`read`, from multiples of it on.

        More where a forward costs much beside its tokens: where weights are paged in from their file or come from the host's
        memory, and most on a GPU that has them, which is done with a block before the next one's kernels are launched.
        """
        first = self.modules[0]
        if first.host is not None:
            return 4 * self.rule.block
        if first.projection("up").weight.device.type != "cpu":
            return 8 * self.rule.block
        return 2 * self.rule.block if self.gather else self.rule.block

    def session(self, cache: Any) -> Session | None:
        """The session that lives on ``cache``, if this model made it."""
        kept = self._kept(cache)
        return None if kept is None else kept.session

    def attach(self, cache: Any, session: Session | None, decoded: torch.Tensor | None = None) -> None:
        """Let ``cache`` go on with ``session`` and with tokens [B, D] decoded since: for who keeps keys and values himself."""
        if session is not None:
            ids = session.ids
            decoded = ids.new_empty(session.batch, 0) if decoded is None else decoded.to(ids.device)
        setattr(cache, _ATTRIBUTE, None if session is None or decoded is None else Kept(session, decoded))

    def expect_text(self, cache: Any) -> None:
        """The next forward over ``cache`` is text, even a single token after the text: a prompt may end with one."""
        kept = self._kept(cache)
        if kept is not None:
            setattr(cache, _ATTRIBUTE, replace(kept, text_next=True))

    def resumable(self, session: Session | None, position: int) -> int:
        """The last position, not after ``position``, from which :func:`read` goes on exactly as a fresh run would."""
        known = 0 if session is None else min(position, session.seen)
        return known - known % self.stride

    def current(self) -> Run | None:
        """The forward under way in this thread."""
        return self._runs.get(threading.get_ident())

    def _kept(self, cache: Any) -> Kept | None:
        kept = getattr(cache, _ATTRIBUTE, None)
        return kept if kept is not None and kept.session.owner is self._token else None

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = caches.cache_in(given.values())
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and embeds is None:
            raise ModelError(f"the decoder got {', '.join(sorted(given))}, expected input_ids or inputs_embeds")
        batch, tokens = (embeds if ids is None else ids).shape[:2]  # type: ignore[union-attr]
        _check_known(given, batch)
        if ids is None:
            ids = torch.full((batch, tokens), UNKNOWN)
        position = int(cache.get_seq_length()) if cache is not None else 0
        kept = self._kept(cache) if position else None
        self._check_kept(kept, position, batch)
        # An evaluation lets many tokens count as so many decode steps.
        as_steps = any(module.scope == "all" for module in self.modules)
        if kept is not None and position >= kept.session.seen and not kept.text_next and (tokens == 1 or as_steps):
            run = Run(kept.session, position, batch, ids, text=False, cache=cache)
        elif as_steps:
            raise ModelError("these tokens are to be decoded, but no text before them has chosen neurons")
        else:
            session = None if kept is None else self._resumed(decoder, cache, given, kept, position)
            real = _real(given.get("attention_mask"), batch, position, tokens)
            run = Run(session, position, batch, ids, text=True, cache=cache, real=real)
        self._runs[threading.get_ident()] = run

    def _check_kept(self, kept: Kept | None, position: int, batch: int) -> None:
        if not position:
            return
        if kept is None:
            raise ModelError(
                f"the key/value cache holds {position} tokens that this model has not read since it was sparsified, so that "
                "no neurons were chosen: start from an empty cache"
            )
        if kept.session.batch != batch:
            raise ModelError(
                f"the batch has {batch} sequences, neurons were chosen for {kept.session.batch}: "
                "sequences cannot be added to or taken from a cache that chose neurons per prompt"
            )
        if position > kept.position:
            raise ModelError(
                f"the key/value cache holds {position} tokens, only {kept.position} were read by this model"
            )

    def _resumed(
        self, decoder: nn.Module, cache: Any, given: Mapping[str, Any], kept: Kept, position: int
    ) -> Session | None:
        """The session of the dense text before ``position``; what of it is not dense or not scored is run again first."""
        session = kept.session
        start = session.resumable(position)
        if start < position or position < session.seen:
            known = torch.cat([session.ids, kept.decoded], 1)[:, :position]
            obstacle = _obstacle(session, known[:, start:], given, position)
            if obstacle is not None:
                raise ModelError(
                    f"text at token {position} needs tokens {start} to {position} run again, which {obstacle}: "
                    "give the whole text to an empty cache"
                )
            session_at = session.cut(start)
            if start == position:
                return session_at
            caches.cut(cache, start)
            self.attach(cache, session_at)
            self.expect_text(cache)
            # Under the name by which it just came.
            name = next((name for name, value in given.items() if value is cache), None)
            argument = caches.cache_argument(decoder.forward, cache) if name is None else {name: cache}
            device = next(decoder.parameters()).device
            with torch.no_grad():
                decoder(input_ids=known[:, start:].to(device), use_cache=True, **argument)
            return self.session(cache)
        return session

    def _placed(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self.current()
        if run is None or run.cache is not None or run.ids.shape[1] > 1:
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                first = int(value.min())
                if first > 0:
                    raise ModelError(
                        f"a decode step at position {first} has a key/value cache that cannot be seen, so that the "
                        "neurons chosen for its prompt cannot be found (is this release of transformers supported?)"
                    )
                run.placed = True

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = self._runs.pop(threading.get_ident(), None)
        if run is None or output is None:
            return
        cache = run.cache
        if not run.text:
            kept = self._kept(cache)
            if kept is not None:
                setattr(cache, _ATTRIBUTE, kept.then(run.position, run.ids.to(kept.decoded.device)))
            return
        if cache is None and run.ids.shape[1] == 1 and not run.placed:
            raise ModelError("a single token came without a key/value cache, and its position cannot be seen")
        if cache is None:
            cache = caches.cache_in([output])
        if cache is not None:  # without one nothing will be decoded from this text
            self.attach(cache, self._extended(run))

    def _extended(self, run: Run) -> Session:
        """The session after a text."""
        # The text stays where it came: bringing it to the host would wait for the forward to be through.
        old, ids = run.session, run.ids.clone()
        real = None if run.real is None else run.real.cpu()
        if old is not None:
            ids = ids.to(old.ids.device)
            if real is not None or old.real is not None:
                parts = [(old.real, old.ids), (real, ids)]
                real = torch.cat(
                    [torch.ones(of.shape, dtype=torch.bool) if one is None else one for one, of in parts], 1
                )
            ids = torch.cat([old.ids, ids], 1)
        tallies = tuple({layer: rows[sequence] for layer, rows in run.fresh.items()} for sequence in range(run.batch))
        return Session(self._token, self.rule, tallies, ids, real)


def read(model: nn.Module, tokens: torch.Tensor, cache: Cache, prompts: Prompts | None) -> Any:
    """Run text [B, T] after what ``cache`` holds; returns the last forward's output, logits of its last token alone.

    With ``prompts`` it goes in strides from fixed positions, so that what a beginning leaves in the cache and in the scores
    is the same to the last bit whatever follows it, and it is text also where it is a single token.
    """
    begin = int(cache.get_seq_length())
    argument = caches.cache_argument(model.forward, cache)
    stops = [tokens.shape[1]]
    if prompts is not None:
        first = prompts.stride - begin % prompts.stride
        stops = [*range(first, tokens.shape[1], prompts.stride), tokens.shape[1]]
    output, at = None, 0
    for stop in stops:
        if prompts is not None:
            prompts.expect_text(cache)
        output = model(input_ids=tokens[:, at:stop], use_cache=True, logits_to_keep=1, **argument)
        at = stop
    return output


def _check_known(given: Mapping[str, Any], batch: int) -> None:
    """ModelError for an argument that could be a mask under a new name: its padding would be scored as text."""
    for name, value in given.items():
        if name not in _KNOWN and isinstance(value, torch.Tensor) and value.dim() in (2, 4) and len(value) == batch:
            raise ModelError(
                f"the decoder got a tensor {name} {list(value.shape)}, expected only {', '.join(sorted(_KNOWN))}"
            )


def _obstacle(session: Session, ids: torch.Tensor, given: Mapping[str, Any], position: int) -> str | None:
    """Why tokens [B, T] of a session cannot be run again in place, in words; None when they can."""
    if session.batch > 1:
        return f"is not done for a batch of {session.batch}"
    if session.real is not None:
        return "is not done where there is padding"
    if bool((ids == UNKNOWN).any()):
        return "came as embeddings"
    places = given.get("position_ids")
    if isinstance(places, torch.Tensor) and places.numel() and int(places.min()) != position:
        return f"are not at their own positions (position_ids begin at {int(places.min())})"
    return None


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
