"""Span: the piece of a sequence that this rank holds, and the four verbs with which a mixer reaches the rest.

    y = span.scan(op, *inputs)           a stateful mixer over the whole sequence
    x = span.halo(x, left, right)        the piece with the tokens just beside it
    y = span.by_channel(fn, x)           a function of the whole sequence, for a slice of the channels
    span.carry                           what came before, read and written by the verbs above

The rest of the sequence may be on other ranks (sequence parallelism), in an earlier block (streaming), or already
generated (decoding). A mixer never knows which; ``Span()`` is a whole sequence on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..errors import InputError
from ..kernels.scan import NO_TOKENS, Carry, StatefulOp, scan
from . import halo as neighbours
from . import reshard
from .mesh import Axis, Mesh
from .relay import AxisRelay, gather
from .traffic import Note, Once, Traffic, every_time

P = ParamSpec("P")
T = TypeVar("T")
Within = Callable[[Tensor, Tensor | None], Tensor]
"""What `Span.halo` can make of a piece and its neighbours."""


def shard_lengths(length: int, size: int) -> list[int]:
    """Tokens that each of ``size`` ranks holds of ``length``: rank r holds ``[r*C, (r+1)*C)`` with ``C =
    ceil(length / size)``.
    """
    chunk = -(-length // size)
    return [max(0, min(chunk, length - rank * chunk)) for rank in range(size)]


@dataclass(frozen=True)
class ChannelShard:
    """The whole sequence of some channels, as `Span.by_channel` hands it to its function.

    Attributes:
        tokens: ``[B, T + L, D_r, ...]``, the carried tokens first.
        num_past: T, the carried tokens; the function answers for the L others.
        channels: which of the D channels these are.
        segments: ``[B, T + L]`` document ids (-1 where nothing was), or None.
    """

    tokens: Tensor
    num_past: int
    channels: slice
    segments: Tensor | None


def _verb(run: Callable[Concatenate[Span, P], T]) -> Callable[Concatenate[Span, P], T]:
    """A verb that ``torch.compile`` leaves as it is where it exchanges: a graph holds no exchange."""
    untraced = _disable_dynamo(run)  # torch.compiler.disable would import the compiler, which takes seconds

    @wraps(run)
    def call(span: Span, *args: P.args, **options: P.kwargs) -> T:
        return (run if span.axis.size == 1 else untraced)(span, *args, **options)

    return call


@dataclass
class _SharedCache:
    """What all layers' views of one span share: the outgoing carry, what is worth finding out once, and what exchanges
    brought.
    """

    carry_out: dict[str, Carry] = field(default_factory=dict)
    found: dict[Any, Tensor | None] = field(default_factory=dict)
    brought: dict[str, Any] = field(default_factory=dict)


@dataclass
class Span:
    """A piece of a sequence and the way to the rest of it. Make one with `Span.of`, or ``Span()`` for a whole sequence.

    Attributes:
        axis: the ranks that share the sequence.
        lengths: tokens held by each of them; None for a single rank, which holds what it is given.
        start: global position of the sequence's first token (not 0 where earlier blocks came before).
        segments: ``[B, n]`` int64 non-decreasing document ids >= 0 of this rank's tokens; None for one document.
        carry: what came before ``start``, by layer and verb; empty at the beginning. The same on every rank.
        keep_carry: whether the verbs write the outgoing carry (streaming, decoding).
        cache_collectives: keep what small exchanges bring: layers will be computed again for their gradients (`at`).
        dropout_seeds: ``[B]`` int64 seeds of the rows for position-keyed dropout; None for no dropout.
        traffic: counts the bytes exchanged.
        layer: name of the layer that uses this view.
    """

    axis: Axis = field(default_factory=Axis)
    lengths: Sequence[int] | None = None
    start: int = 0
    segments: Tensor | None = None
    carry: Mapping[str, Carry] = field(default_factory=dict)
    keep_carry: bool = False
    cache_collectives: bool = False
    dropout_seeds: Tensor | None = None
    traffic: Traffic = field(default_factory=Traffic)
    layer: str = ""
    _cache: _SharedCache = field(default_factory=_SharedCache)
    _calls: int = 0

    @classmethod
    def of(cls, mesh: Mesh, length: int, **fields: Any) -> Span:
        """This rank's share of a sequence of ``length`` tokens, split over ``mesh.sequence``.

        ``fields`` are the attributes of `Span`; ``segments`` are those of this rank's tokens (see `shard`).
        """
        return cls(axis=mesh.sequence, lengths=shard_lengths(length, mesh.sequence.size), **fields)

    def __post_init__(self) -> None:
        if self.lengths is None and self.axis.size > 1:
            raise InputError("Span.lengths", None, "one length for each rank of the axis", "use Span.of(mesh, length)")
        if self.lengths is not None and len(self.lengths) != self.axis.size:
            raise InputError("Span.lengths", list(self.lengths), f"{self.axis.size} lengths, one a rank")

    @property
    def position(self) -> int:
        """Global position of this rank's first token."""
        return self.start + (0 if self.lengths is None else sum(self.lengths[: self.axis.rank]))

    @property
    def carry_out(self) -> dict[str, Carry]:
        """What the verbs wrote for the tokens that follow, if ``keep_carry``."""
        return self._cache.carry_out

    def shard(self, x: Tensor) -> Tensor:
        """This rank's tokens of ``x [B, L, ...]``, all tokens from position 0 on."""
        return x if self.lengths is None else x[:, self.position : self.position + self.lengths[self.axis.rank]]

    def for_layer(self, layer: str, **fields: Any) -> Span:
        """The view of this span for one layer: its verbs' carries and bytes go under that name.

        A layer that is computed again takes a new view of the same name, with ``cache_collectives=True`` both times: then ranks
        exchange states and halos once, and the carry is that of the first time.
        """
        return replace(self, layer=f"{self.layer}.{layer}" if self.layer else layer, **fields, _calls=0)

    def with_carry(self, carry: Mapping[str, Carry], **fields: Any) -> Span:
        """This span with what came before it, and nothing yet of what it leaves."""
        return replace(self, carry=carry, **fields, _cache=_SharedCache(), _calls=0)

    def next_block(self, length: int) -> Span:
        """The span of the next tokens: it starts where this one (of ``length`` tokens over all ranks) ends, with
        its carry.
        """
        return self.with_carry(self.carry_out, start=self.start + length, segments=None)

    @_verb
    def scan(self, op: StatefulOp, *inputs: Tensor) -> Tensor:
        """A stateful mixer over the whole sequence.

        Args:
            op: its two passes and adjoints.
            inputs: this piece's activations ``[B, n, ...]``, and parameters.

        Returns:
            This piece's output.
        """
        key, note = self._call("scan")
        relay = None
        if self.axis.size > 1:
            ends_once = partial(self._remembered, "ends")
            note_ends = self.traffic.note("segments", "scan")
            relay = AxisRelay(self.axis, note, self._once(key), note_ends, ends_once, self.keep_carry)
        y, after = scan(op, *inputs, segments=self.segments, carry=self.carry.get(key), relay=relay)
        self._leave(key, lambda: after)
        return y

    @_verb
    def halo(self, x: Tensor, left: int, right: int = 0, within: Within | None = None) -> Tensor:
        """The piece with the tokens just beside it, or a function that looks no farther than these.

        Args:
            x: ``[B, n, ...]``, this piece.
            left, right: how many tokens before and after it. They may span several ranks.
            within: a function of tokens ``[B, m, ...]`` and their document ids ``[B, m]`` (or None), whose ``[B, m,
                ...]`` are each of a token and of so many before and after it, with zeros beyond those it gets. It
                begins with the tokens that need no neighbour while those travel.

        Returns:
            ``[B, left + n + right, ...]``, zero beyond the sequence's ends (`halo_segments` has the ids that go with
            it); or what ``within`` makes of this piece, ``[B, n, ...]``.
        """
        key, note = self._call("halo")
        return self._near(key, note, self.carry.get(key), x, left, right, within)

    def _near(
        self, key: str, note: Note, past: Carry | None, x: Tensor, left: int, right: int, within: Within | None
    ) -> Tensor:
        """`halo`, as part of any verb."""
        lengths, state = self._lengths(x), None if past is None else past.state
        look = None
        if within is not None:
            ids, run = self.halo_segments(left, right), within

            def look(tokens: Tensor, place: slice) -> Tensor:
                return run(tokens, None if ids is None else ids[:, place])

        y = neighbours.halo(x, self.axis, lengths, left, right, note, self._once(key), state, look)

        def leaving() -> Carry:
            tail = neighbours.tail(x, state, self.axis, lengths, left, note)
            return Carry(tail, self._tail_segments(past, left))

        self._leave(key, leaving)
        return y

    @_verb
    def halo_segments(self, left: int, right: int = 0) -> Tensor | None:
        """Document ids ``[B, left + n + right]`` of a `halo` (-1 where no token is), or None for one document."""
        if self.segments is None:
            return None
        key = ("halo", left, right)
        if key not in self._cache.found:
            ids, lengths = self.segments, self._lengths(self.segments)
            note = self.traffic.note("segments", "halo")
            extended = neighbours.borrow(ids, self.axis, lengths, left, right, -1, note)
            past = self._carried_ids(left)
            if past is not None:
                extended = neighbours.with_past(extended, past, self.axis, lengths, left, note)
            self._cache.found[key] = extended
        return self._cache.found[key]

    @_verb
    def by_channel(self, fn: Callable[[ChannelShard], Tensor], x: Tensor, reach: int | None = 0) -> Tensor:
        """A function of the whole sequence, run by each rank on its slice of the channels.

        Args:
            fn: gets a `ChannelShard`, returns ``[B, L, D_r, ...]`` for its L new tokens (``D_r`` may be 0: more ranks than
                channels).
            x: ``[B, n, D, ...]``, this piece; dimension 2 (channels, or heads) is what is sliced.
            reach: how many tokens of the past each of ``fn``'s outputs depends on, and none of the future, with zeros
                where there are none; None for more. Where so many are fewer bytes than the exchange of tokens for
                channels, ``fn`` gets this piece with them instead, all channels of it.

        Returns:
            ``[B, n, D, ...]``, this piece of the result.
        """
        key, note = self._call("by_channel")
        lengths, units = self._lengths(x), x.shape[2]
        past = self.carry.get(key)
        # The exchange sends twice (size - 1) / size of a piece; half of that is left, as borrowed tokens are work too.
        if reach is not None and self.axis.size > 1 and reach * self.axis.size <= max(lengths) * (self.axis.size - 1):

            def alone(tokens: Tensor, ids: Tensor | None) -> Tensor:
                return fn(ChannelShard(tokens, 0, slice(0, units), ids))

            return self._near(key, note, past, x, reach, 0, alone)
        segments, carried, num_past = self._whole_segments(), None, 0
        first = sum(reshard.channel_shard_sizes(units, self.axis.size)[: self.axis.rank])
        if past is not None:
            carried = reshard.own_channels(past.state.to(x.dtype), self.axis, note)
            num_past = carried.shape[1]
            if segments is not None and past.segment is not None:
                segments = torch.cat([past.segment, segments], dim=1)
        kept: list[Tensor] = []

        def run(tokens: Tensor, channels: slice) -> Tensor:
            if carried is not None:
                own = carried[:, :, channels.start - first : channels.stop - first]
                tokens = torch.cat([own, tokens], dim=1)
            if self.keep_carry:
                kept.append(tokens if reach is None else _last(tokens, reach, 0))
            return fn(ChannelShard(tokens, num_past, channels, segments))

        y = reshard.by_channel(run, x, self.axis, lengths, note)

        def leaving() -> Carry:
            state = reshard.all_channels(torch.cat(kept, dim=2), self.axis, units, note)
            ids = segments if segments is None or reach is None else _last(segments, reach, NO_TOKENS)
            return Carry(state, ids)

        self._leave(key, leaving)
        return y

    def _call(self, verb: str) -> tuple[str, Note]:
        """The carry's key of this verb's call in this layer, and where its bytes are counted."""
        key = f"{self.layer}.{verb}{self._calls}"
        self._calls += 1
        return key, self.traffic.note(self.layer, verb)

    def _leave(self, key: str, carry: Callable[[], Carry]) -> None:
        """Write what a verb leaves to the tokens that follow, if they are wanted; the first time, not when a layer is
        computed again.
        """
        if self.keep_carry and key not in self.carry_out:
            self.carry_out[key] = carry()

    def _once(self, key: str) -> Once:
        """How a verb makes an exchange that is small enough to be remembered."""
        return partial(self._remembered, key) if self.cache_collectives else every_time

    def _remembered(self, key: str, exchange: Callable[[], Any]) -> Any:
        brought = self._cache.brought
        if key not in brought:
            brought[key] = exchange()
        return brought[key]

    def _lengths(self, x: Tensor) -> Sequence[int]:
        lengths = [x.shape[1]] if self.lengths is None else self.lengths
        assert lengths[self.axis.rank] == x.shape[1], (lengths, self.axis.rank, x.shape)
        return lengths

    def _carried_ids(self, reach: int) -> Tensor | None:
        """Ids of the carried tokens of any halo of this reach: they are the same tokens in every layer."""
        for carry in self.carry.values():
            if carry.segment is not None and carry.segment.dim() == 2 and carry.segment.shape[1] == reach:
                return carry.segment
        return None

    def _tail_segments(self, past: Carry | None, reach: int) -> Tensor | None:
        if self.segments is None:
            return None
        key = ("tail", reach)
        if key not in self._cache.found:
            ids = None if past is None or past.segment is None else past.segment + 1
            lengths = self._lengths(self.segments)
            note = self.traffic.note("segments", "halo")
            # Shifted by one, because a missing token is 0 in a tail and -1 among ids.
            self._cache.found[key] = neighbours.tail(self.segments + 1, ids, self.axis, lengths, reach, note) - 1
        return self._cache.found[key]

    def _whole_segments(self) -> Tensor | None:
        """All tokens' ids ``[B, L]``, gathered once."""
        if self.segments is None or self.axis.size == 1:
            return self.segments
        if "whole" not in self._cache.found:
            lengths = self._lengths(self.segments)
            padded = self.segments.new_full((self.segments.shape[0], max(lengths)), -1)
            padded[:, : self.segments.shape[1]] = self.segments
            rows = gather([padded], self.axis, self.traffic.note("segments", "by_channel"))
            ids = [row[:, :length] for (row,), length in zip(rows, lengths, strict=True)]
            self._cache.found["whole"] = torch.cat(ids, dim=1)
        return self._cache.found["whole"]


def _last(x: Tensor, length: int, fill: int) -> Tensor:
    """The last tokens of ``x [B, T, ...]``, ``fill`` before the first."""
    lacking = length - x.shape[1]
    if lacking <= 0:
        return x[:, -lacking:]
    return torch.cat([x.new_full((x.shape[0], lacking, *x.shape[2:]), fill), x], dim=1)
