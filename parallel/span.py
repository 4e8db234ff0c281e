"""Span: the part of a sequence that this rank computes, and the verbs by which a mixer reaches the rest of it.

    y = span.scan(op, *inputs)           a stateful mixer: an exclusive scan of states over the shards
    x = span.halo(x, left, right)        the shard with its halo of neighbouring tokens
    y = span.by_channel(fn, x)           a function of the whole sequence, sharded by channels (all-to-all)
    span.carry, span.carry_out           what the verbs read of earlier tokens, and write for later ones

The rest of the sequence may be on other ranks (sequence parallelism), in an earlier block (streaming), or generated
already (decoding). A mixer is the same code for all three; ``Span()`` is a whole sequence on one device.

A span covers the tokens that all ranks process in one call: the whole sequence, or one streamed block of it, or the
next generated token. Below, "the sequence" means these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import _aliases
from ..errors import InputError
from ..kernels.scan import scan
from ..kernels.state import NO_TOKENS, Carry, StatefulOp
from . import halo as halo_exchange
from . import reshard
from .mesh import Axis, Mesh
from .relay import AxisStateExchange, gather
from .traffic import ByteCounter, CollectiveCache, Traffic, uncached

P = ParamSpec("P")
T = TypeVar("T")
LocalFunction = Callable[[Tensor, Tensor | None], Tensor]
"""A function of tokens and their document ids whose outputs depend on neighbouring tokens only; see `Span.halo`."""


def shard_lengths(length: int, size: int) -> list[int]:
    """Tokens of each of ``size`` shards of ``length`` tokens: rank r holds ``[r*C, (r+1)*C)``, ``C = ceil(length /
    size)``.
    """
    most = -(-length // size)
    return [max(0, min(most, length - rank * most)) for rank in range(size)]


@dataclass(frozen=True)
class ChannelShard:
    """All tokens of some channels: what `Span.by_channel` passes to its function, unless a halo is enough.

    Attributes:
        tokens: ``[B, T + L, D_r, ...]``, the carried tokens first.
        num_past: T, the carried tokens; the function returns outputs for the L others.
        channels: which of the D channels these are.
        segments: ``[B, T + L]`` document ids (-1 where there is no token), or None.
    """

    tokens: Tensor
    num_past: int
    channels: slice
    segments: Tensor | None


def _untraced_across_ranks(run: Callable[Concatenate[Span, P], T]) -> Callable[Concatenate[Span, P], T]:
    """``torch.compile`` traces ``run`` on one rank and skips it where it exchanges: a graph holds no exchange."""
    untraced = _disable_dynamo(run)  # torch.compiler.disable would import the compiler, which takes seconds

    @wraps(run)
    def call(span: Span, *args: P.args, **options: P.kwargs) -> T:
        return (run if span.axis.size == 1 else untraced)(span, *args, **options)

    return call


@dataclass
class _SharedCache:
    """Shared by all layers' views of one span.

    Attributes:
        carry_out: by key, what the verbs wrote for the next tokens.
        ids: document ids that were exchanged once for all layers.
        collectives: by key, results of exchanges, for recomputation.
    """

    carry_out: dict[str, Carry] = field(default_factory=dict)
    ids: dict[Any, Tensor | None] = field(default_factory=dict)
    collectives: dict[str, Any] = field(default_factory=dict)


@_aliases.with_old_members(_aliases.SPAN_MEMBERS)
@dataclass
class Span:
    """A part of a sequence and the way to the rest. Make one with `Span.of`, or ``Span()`` for a whole sequence.

    Attributes of its geometry:
        axis: the ranks that share the sequence.
        lengths: tokens of each rank's shard; None for a single rank, which holds what it is given.
        start: global position of the first token of all ranks; not 0 where earlier blocks came before.
        segments: ``[B, n]`` int64 non-decreasing document ids >= 0 of this rank's tokens; None for one document.
    of its state:
        carry: what came before ``start``, by layer and call; empty at the beginning. The same on every rank.
        keep_carry: whether the verbs write the outgoing carry (streaming, decoding).
    of its scope:
        layer: name of the layer that uses this view.
    of the run:
        dropout_seeds: ``[B]`` int64 seeds of the rows for position-keyed dropout; None for no dropout.
        cache_collectives: keep the results of small exchanges, as layers will be recomputed (`for_layer`).
        traffic: counts the bytes exchanged.
    """

    axis: Axis = field(default_factory=Axis)
    lengths: Sequence[int] | None = None
    start: int = 0
    segments: Tensor | None = None

    carry: Mapping[str, Carry] = field(default_factory=dict)
    keep_carry: bool = False

    layer: str = ""

    dropout_seeds: Tensor | None = None
    cache_collectives: bool = False
    traffic: Traffic = field(default_factory=Traffic)
    _cache: _SharedCache = field(default_factory=_SharedCache)
    _names: set[str] = field(default_factory=set)  # of this view's calls, each of which has a carry of its own

    @classmethod
    def of(cls, mesh: Mesh, length: int, **fields: Any) -> Span:
        """This rank's shard of a sequence of ``length`` tokens, split over ``mesh.sequence``.

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
        """What the verbs wrote for the next tokens, if ``keep_carry``."""
        return self._cache.carry_out

    def shard(self, x: Tensor) -> Tensor:
        """This rank's tokens of ``x [B, L, ...]``, which holds all tokens from position 0 on; x itself without
        `lengths`, where a rank holds what it is given.
        """
        return x if self.lengths is None else x[:, self.position : self.position + self.lengths[self.axis.rank]]

    def for_layer(self, layer: str, **fields: Any) -> Span:
        """The view of this span for one layer: carries and bytes of its verbs go under that name.

        A layer that is recomputed takes a new view of the same name, with ``cache_collectives=True`` in the first
        forward pass and in the recomputation: then states and halos are exchanged once, and the carry is that of the
        first pass.
        """
        return replace(self, layer=f"{self.layer}.{layer}" if self.layer else layer, **fields, _names=set())

    def with_carry(self, carry: Mapping[str, Carry], **fields: Any) -> Span:
        """This span with another incoming carry, and an empty outgoing one."""
        return replace(self, carry=carry, **fields, _cache=_SharedCache(), _names=set())

    def next_block(self, length: int) -> Span:
        """The span after this one, of as many tokens on each rank, with the carry that this one wrote.

        ``length``: tokens of this span over all ranks.
        """
        return self.with_carry(dict(self.carry_out), start=self.start + length, segments=None)

    def scan(self, op: StatefulOp, *inputs: Tensor, name: str = "scan") -> Tensor:
        """A stateful mixer over the whole sequence.

        Args:
            op: its passes and their adjoints.
            inputs: this shard's activations ``[B, n, ...]``, and parameters.
            name: of this call; a layer that scans twice names its calls.

        Returns:
            The outputs of this shard.
        """
        key = self._key(name)
        if self.axis.size == 1:
            y, final = scan(op, *inputs, segments=self.segments, carry=self.carry.get(key))
        else:
            y, final = self._scan_across_ranks(key, op, inputs)
        self._write_carry(key, lambda: final)
        return y

    @_disable_dynamo
    def _scan_across_ranks(self, key: str, op: StatefulOp, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Carry]:
        exchange = AxisStateExchange(
            self.axis,
            self._counter("scan"),
            self._collective_cache(key),
            self.traffic.counter("segments", "scan"),
            partial(self._cached, "boundary ids"),
            self.keep_carry,
        )
        return scan(op, *inputs, segments=self.segments, carry=self.carry.get(key), relay=exchange)

    def release(self) -> None:
        """Drop the outgoing carry and the cached exchanges, once this span is done with.

        The autograd graph of a carry may hold the span (recomputation does), a cycle that Python cannot collect.
        """
        for shared in vars(self._cache).values():
            shared.clear()

    @_untraced_across_ranks
    def halo(
        self, x: Tensor, left: int, right: int = 0, fn: LocalFunction | None = None, *, name: str = "halo"
    ) -> Tensor:
        """The shard with its halo of neighbouring tokens, or a function of both.

        Args:
            x: ``[B, n, ...]``, this shard.
            left, right: halo tokens before and after it. They may span several ranks.
            fn: a function of tokens ``[B, m, ...]`` and their document ids ``[B, m]`` (or None). Each of its ``[B, m,
                ...]`` outputs depends on its own token, on ``left`` tokens before and ``right`` after it, with zeros
                beyond those it gets. It runs on the tokens that need no halo while the exchange goes on.
            name: of this call; a layer that calls `halo` twice names its calls.

        Returns:
            ``[B, left + n + right, ...]``, zero beyond the sequence's ends (`halo_segments` has the ids that go with
            it); or the outputs of ``fn`` for this shard, ``[B, n, ...]``.
        """
        return self._halo(self._key(name), self._counter("halo"), x, left, right, fn)

    def _halo(self, key: str, count: ByteCounter, x: Tensor, left: int, right: int, fn: LocalFunction | None) -> Tensor:
        past = self.carry.get(key)
        lengths, state = self._lengths(x), None if past is None else past.state
        local = None
        if fn is not None:
            ids, run = self.halo_segments(left, right), fn

            def local(tokens: Tensor, place: slice) -> Tensor:
                return run(tokens, None if ids is None else ids[:, place])

        cached = self._collective_cache(key)
        y = halo_exchange.halo(x, self.axis, lengths, left, right, count, cached, state, local)

        def carry() -> Carry:
            tail = halo_exchange.tail(x, state, self.axis, lengths, left, count)
            return Carry(tail, self._tail_segments(past, left))

        self._write_carry(key, carry)
        return y

    @_untraced_across_ranks
    def halo_segments(self, left: int, right: int = 0) -> Tensor | None:
        """Document ids ``[B, left + n + right]`` of a `halo` (-1 where there is no token), or None for one document."""
        if self.segments is None:
            return None
        key = ("halo", left, right)
        if key not in self._cache.ids:
            ids, lengths = self.segments, self._lengths(self.segments)
            count = self.traffic.counter("segments", "halo")
            extended = halo_exchange.with_halo(ids, self.axis, lengths, left, right, -1, count)
            past = self._carried_ids(left)
            if past is not None:
                extended = halo_exchange.with_past(extended, past, self.axis, lengths, left, count)
            self._cache.ids[key] = extended
        return self._cache.ids[key]

    @_untraced_across_ranks
    def by_channel(
        self,
        fn: Callable[[ChannelShard], Tensor],
        x: Tensor,
        reach: int | None = None,
        *,
        past_columns: int | None = None,
        name: str = "by_channel",
    ) -> Tensor:
        """A function of the whole sequence, run by each rank on its share of the channels.

        Args:
            fn: gets a `ChannelShard`, returns ``[B, L, D_r, ...]`` for its L new tokens (``D_r`` may be 0: more ranks
                than channels).
            x: ``[B, n, D, ...]``, this shard; dimension 2 (channels, or heads) is what is split.
            reach: how many past tokens each output of ``fn`` depends on, and on no future ones, with zeros where there
                are none; None for any, past or future. Where a halo of that width is fewer bytes than the all-to-all,
                ``fn`` gets shards with their halos instead, all channels of them (``num_past = 0``; it answers for
                every token that it gets), possibly in several calls.
            past_columns: how many of the last columns (dimension -1 of ``x``) ``fn`` reads of carried tokens, such as
                the keys and values beside queries; the others are not carried, and zeros there. None for all.
            name: of this call; a layer that calls `by_channel` twice names its calls.

        Returns:
            ``[B, n, D, ...]``, this shard of the result.
        """
        key, count = self._key(name), self._counter("by_channel")
        lengths, units = self._lengths(x), x.shape[2]
        past = self.carry.get(key)
        # The all-to-alls send twice (size - 1) / size of a shard. Half of that is the limit: halo tokens are work, too.
        if reach is not None and self.axis.size > 1 and reach * self.axis.size <= max(lengths) * (self.axis.size - 1):

            def by_token(tokens: Tensor, ids: Tensor | None) -> Tensor:
                return fn(ChannelShard(tokens, 0, slice(0, units), ids))

            return self._halo(key, count, x, reach, 0, by_token)
        segments, carried, num_past = self._all_segments(), None, 0
        first = sum(reshard.channel_shard_sizes(units, self.axis.size)[: self.axis.rank])
        if past is not None:
            carried = reshard.own_channels(past.state.to(x.dtype), self.axis, count)
            num_past = carried.shape[1]
            if segments is not None and past.segment is not None:
                segments = torch.cat([past.segment, segments], dim=1)
        kept: list[Tensor] = []
        unread = 0 if past_columns is None else x.shape[-1] - past_columns

        def run(tokens: Tensor, channels: slice) -> Tensor:
            if carried is not None:
                own = carried[:, :, channels.start - first : channels.stop - first]
                if own.shape[-1] < tokens.shape[-1]:
                    own = F.pad(own, (unread, 0))
                tokens = torch.cat([own, tokens], dim=1)
            if self.keep_carry:
                past_tokens = tokens[..., unread:] if unread else tokens
                kept.append(past_tokens if reach is None else _last(past_tokens, reach, 0))
            return fn(ChannelShard(tokens, num_past, channels, segments))

        y = reshard.by_channel(run, x, self.axis, lengths, count)

        def carry() -> Carry:
            state = reshard.all_channels(torch.cat(kept, dim=2), self.axis, units, count)
            ids = segments if segments is None or reach is None else _last(segments, reach, NO_TOKENS)
            return Carry(state, ids)

        self._write_carry(key, carry)
        return y

    def _key(self, name: str) -> str:
        """The key of a call's carry and of its cached exchanges."""
        if self.keep_carry or self.cache_collectives:
            if name in self._names:
                allowed = f"is the name of another call in layer {self.layer!r}, whose carry it would take"
                raise InputError("Span call", name, allowed, f"name the calls, as in name='{name}_2'")
            self._names.add(name)
        return f"{self.layer}.{name}"

    def _counter(self, verb: str) -> ByteCounter:
        return self.traffic.counter(self.layer, verb)

    def _write_carry(self, key: str, carry: Callable[[], Carry]) -> None:
        """Write what the next tokens need of a call, if it is kept: only once where a layer is recomputed."""
        if self.keep_carry and key not in self.carry_out:
            self.carry_out[key] = carry()

    def _collective_cache(self, key: str) -> CollectiveCache:
        return partial(self._cached, key) if self.cache_collectives else uncached

    def _cached(self, key: str, collective: Callable[[], Any]) -> Any:
        found = self._cache.collectives
        if key not in found:
            found[key] = collective()
        return found[key]

    def _lengths(self, x: Tensor) -> Sequence[int]:
        lengths = [x.shape[1]] if self.lengths is None else self.lengths
        assert lengths[self.axis.rank] == x.shape[1], (lengths, self.axis.rank, x.shape)
        return lengths

    def _carried_ids(self, reach: int) -> Tensor | None:
        """Ids of the carried tokens of any halo of this width: they are the same tokens in every layer."""
        for carry in self.carry.values():
            if carry.segment is not None and carry.segment.dim() == 2 and carry.segment.shape[1] == reach:
                return carry.segment
        return None

    def _tail_segments(self, past: Carry | None, reach: int) -> Tensor | None:
        if self.segments is None:
            return None
        key = ("tail", reach)
        if key not in self._cache.ids:
            ids = None if past is None or past.segment is None else past.segment + 1
            lengths = self._lengths(self.segments)
            count = self.traffic.counter("segments", "halo")
            # Shifted by one, because a missing token is 0 in a tail and -1 among ids.
            tail = halo_exchange.tail(self.segments + 1, ids, self.axis, lengths, reach, count) - 1
            self._cache.ids[key] = tail
        return self._cache.ids[key]

    def _all_segments(self) -> Tensor | None:
        """Document ids ``[B, L]`` of all tokens, gathered once."""
        if self.segments is None or self.axis.size == 1:
            return self.segments
        if "all" not in self._cache.ids:
            lengths = self._lengths(self.segments)
            padded = self.segments.new_full((self.segments.shape[0], max(lengths)), -1)
            padded[:, : self.segments.shape[1]] = self.segments
            rows = gather([padded], self.axis, self.traffic.counter("segments", "by_channel"))
            ids = [row[:, :length] for (row,), length in zip(rows, lengths, strict=True)]
            self._cache.ids["all"] = torch.cat(ids, dim=1)
        return self._cache.ids["all"]


def _last(x: Tensor, length: int, fill: int) -> Tensor:
    """The last ``length`` tokens of ``x [B, T, ...]``, ``fill`` before the first."""
    lacking = length - x.shape[1]
    if lacking <= 0:
        return x[:, -lacking:]
    return torch.cat([x.new_full((x.shape[0], lacking, *x.shape[2:]), fill), x], dim=1)


def __getattr__(name: str) -> Any:
    return _aliases.attribute(__name__, name)
