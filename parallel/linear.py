"""Linear attention over the ranks that share a sequence: only states move."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import attention
from ..attention.arguments import check_number
from ..attention.documents import check_documents, ids_of_tokens
from ..attention.linear.attention import check_linear, state_map
from ..attention.operation import operation, recomputed
from .collectives import AllGather, AllToAll, check_shard
from .layout import Layout, Segment


@operation
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    group: dist.ProcessGroup,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
    schedule: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`longspan.attention.linear_attention` of a sequence spread over ``group``.

    Every rank of the group must call it. A segment of the layout maps the state before it to the
    one after it, ``S -> A S + B``, where ``A`` is a factor per head or key, with the delta rule a
    matrix, and 0 across a document's edge (LASP-2, arXiv 2502.07563). Only these maps move, in fp32
    (fp64 for fp64), each as large as a state or two whatever the length. Backward is the transpose,
    by autograd.

    Args:
        q, k, v, beta: this rank's tokens, as ``layout`` places them:
            ``[batch, local time, heads, dim]``, possibly none.
        decay: ``[heads]``, or of this rank's tokens.
        layout: of the sequence over the ranks of ``group``.
        state: before the sequence's first token, the same on every rank; its gradient is this
            rank's share.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.
        return_state: also return the state after the whole sequence's last token, on every rank.
        schedule: ``gather`` (all maps on every rank), ``scan`` (log2 of the number of segments
            steps) or ``auto``.

    Returns:
        This rank's tokens of the output, and the last state with ``return_state``. Gradients are
        those of the sum of all ranks' losses.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_linear(q, k, v, decay, beta, state, backend)
    scale = check_number("scale", scale)
    check_shard(layout, group, q.shape[1])
    documents = check_documents(documents, (q.shape[0], layout.length))
    if schedule not in ("auto", "gather", "scan"):
        raise ValueError(f"schedule must be auto, gather or scan, got {schedule!r}")
    if layout.ranks == 1:
        return attention.linear_attention(
            q, k, v, decay=decay, beta=beta, scale=scale, state=state, documents=documents,
            return_state=return_state, backend=backend,
        )  # fmt: skip

    own_segments = layout.segments_of_rank[group.rank()]
    shard = _Tokens(q, k, v, decay, beta)
    inputs = [shard.part(segment.slots) for segment in own_segments]

    # The map of each of this rank's segments.
    reach = _Reach(documents, layout)
    maps = []
    for segment, tokens in zip(own_segments, inputs, strict=True):
        reaches_end = reach.over_tokens(segment.start, segment.stop)
        maps.append(tokens.state_map(_ids(documents, segment), backend).with_reach(reaches_end))

    identity, first_state = shard.identity_and_first_state(state, backend)
    is_scan = schedule == "scan" or (schedule == "auto" and scan_steps(layout) > 0)
    exchange_states = _scan_states if is_scan else _gather_states
    states, last = exchange_states(maps, identity, first_state, reach, layout, group, return_state)

    # The output of each segment, from the state before it. What a rank without tokens returns is
    # tied to what it receives, so that it joins the collective of backward.
    outs = [v[:, :0] + last[:0].sum().to(v.dtype)]
    for segment, tokens, state_before in zip(own_segments, inputs, states, strict=True):
        continues = reach.over_tokens(segment.start, segment.start + 1)
        entering = _choose(state_before, continues)
        outs.append(tokens.output(entering, _ids(documents, segment), scale, backend))
    out = torch.cat(outs, 1)
    return (out, last) if return_state else out


def scan_steps(layout: Layout) -> int:
    """Return the number of steps of a scan, or 0 if a gather, which has one, is preferred.

    A scan is preferred if it moves less than half of what a gather does.
    """
    steps = len(_scan_distances(layout))
    return steps if 2 * steps < layout.ranks - 1 else 0


class StateMap(NamedTuple):
    """What tokens do to the state before them: ``S -> kept S + added``.

    ``kept`` is a factor of each row of the state, ``[..., key_dim, 1]``, or a matrix
    ``[..., key_dim, key_dim]``; ``added`` is ``[..., key_dim, value_dim]``.
    """

    added: Tensor
    kept: Tensor
    reaches_end: Tensor | None = None
    """Whether the state before the tokens is of the last token's document, else it is dropped: bool
    ``[batch, 1, 1, 1]``, or None if it is everywhere."""

    def __call__(self, state: Tensor) -> Tensor:
        """Return the state after the tokens."""
        return self.added + self._keep(state)

    def after(self, earlier: "StateMap", reaches_end: Tensor | None) -> "StateMap":
        """Return the map of the tokens of ``earlier`` and these after them.

        Args:
            reaches_end: of the new map.
        """
        joined = StateMap(self(earlier.added), self._keep(earlier.kept))
        return joined.with_reach(reaches_end)

    def with_reach(self, reaches_end: Tensor | None) -> "StateMap":
        """Return the map that drops the state of batch rows whose document it is not.

        By a choice: a factor of 0 would let a NaN of another document through.
        """
        return StateMap(self.added, _choose(self.kept, reaches_end), reaches_end)

    def tied_to(self, zero: Tensor) -> "StateMap":
        """Return the same map, part of whose graph ``zero``, a sum of nothing, is."""
        return self._replace(added=self.added + zero)

    def _keep(self, x: Tensor) -> Tensor:
        x = _choose(x, self.reaches_end)
        if self.kept.shape[-1] == 1:
            return self.kept * x
        return recomputed(torch.matmul, self.kept, x)


class _Tokens(NamedTuple):
    """The inputs of some tokens: ``[batch, time, heads, dim]``; ``decay`` may be ``[heads]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None

    def part(self, slots: slice) -> "_Tokens":
        """Return the inputs of some of the tokens."""
        decay, beta = self.decay, self.beta
        if decay is not None and decay.ndim > 1:
            decay = decay[:, slots]
        if beta is not None:
            beta = beta[:, slots]
        return _Tokens(self.q[:, slots], self.k[:, slots], self.v[:, slots], decay, beta)

    def state_map(self, ids: Tensor | None, backend: str) -> StateMap:
        """Return the map of the tokens, whose document ids are ``ids`` ``[batch, time]``."""
        kept, added = state_map(self.k, self.v, self.decay, self.beta, ids, backend=backend)
        return StateMap(added, kept)

    def output(self, state: Tensor, ids: Tensor | None, scale: float, backend: str) -> Tensor:
        """Return the output of the tokens, from the state before them."""
        out = attention.linear_attention(
            self.q, self.k, self.v, decay=self.decay, beta=self.beta, scale=scale, state=state,
            documents=ids, backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # without return_state
        return out

    def identity_and_first_state(
        self, state: Tensor | None, backend: str
    ) -> tuple[StateMap, Tensor]:
        """Return the map of no tokens, and the state before the sequence, zeros if it is None.

        Backward is a collective, also for a rank without tokens: it sends this map, which is tied
        to all inputs that may differ from rank to rank.
        """
        identity = self.part(slice(0, 0)).state_map(None, backend)
        first_state = torch.zeros_like(identity.added)
        if state is not None:
            first_state = state.to(identity.added.dtype)
        zero = self.q[:, :0].sum() + self.k[:, :0].sum() + self.v[:, :0].sum()
        for x in (self.beta, self.decay):
            if x is not None and x.ndim > 1:
                zero = zero + x[:, :0].sum()
        return identity.tied_to(zero + first_state[:0].sum()), first_state


def _ids(documents: Tensor | None, segment: Segment) -> Tensor | None:
    return None if documents is None else ids_of_tokens(documents, segment.tokens)


def _choose(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return ``x`` with zeros in the batch rows that are not among ``rows``; None is all."""
    return x if rows is None else x.where(rows, 0.0)


class _Reach:
    """How far states go: which of them are of the document of a later token."""

    def __init__(self, documents: Tensor | None, layout: Layout):
        self._documents = documents
        self._segments = layout.segments_in_order

    def over_tokens(self, start: int, stop: int) -> Tensor | None:
        """Return whether the state before token ``start`` is of the document of ``stop - 1``.

        bool ``[batch, 1, 1, 1]``; None without documents. The state before the sequence is of the
        first token's document.
        """
        if self._documents is None:
            return None
        ids = self._documents
        return (ids[:, max(0, start - 1)] == ids[:, stop - 1])[:, None, None, None]

    def over_segments(self, first: int, stop: int) -> Tensor | None:
        """Return the same for the segments from number ``first`` to ``stop - 1``."""
        return self.over_tokens(self._segments[max(0, first)].start, self._segments[stop - 1].stop)


def _pack(maps: list[StateMap]) -> Tensor:
    """Return maps as a message ``[maps, batch, heads, key_dim, value_dim + columns of kept]``."""
    return torch.stack([torch.cat([state_map.added, state_map.kept], -1) for state_map in maps])


def _unpack(message: Tensor, like: StateMap) -> list[StateMap]:
    widths = [like.added.shape[-1], like.kept.shape[-1]]
    return [StateMap(*packed.split(widths, -1)) for packed in message]


def _gather_states(
    maps: list[StateMap],
    identity: StateMap,
    first_state: Tensor,
    reach: _Reach,
    layout: Layout,
    group: dist.ProcessGroup,
    return_state: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return the states before this rank's segments, and the one after the last segment.

    Every rank gets all maps, and applies them one after another.

    Args:
        maps: of this rank's segments.
        identity: the map of no tokens, tied to this rank's inputs.
        first_state: the state before the sequence.
        reach: of the states over the segments.
        return_state: whether the last state is needed.
    """
    most_segments = max(len(segments) for segments in layout.segments)
    padded = maps + [identity] * (most_segments - len(maps))
    gathered = AllGather.apply(_pack(padded), group)  # [ranks, segments of a rank, ...]
    maps_of_ranks = [iter(_unpack(message, identity)) for message in gathered]

    states = []
    state = first_state + gathered[:0].sum()
    for segment in layout.segments_in_order:
        if segment.rank == group.rank():
            states.append(state)
        state_map_of_segment = next(maps_of_ranks[segment.rank])
        reaches_end = reach.over_tokens(segment.start, segment.stop)
        state = state_map_of_segment.with_reach(reaches_end)(state)
    return states, state


def _scan_distances(layout: Layout) -> list[int]:
    """Return how many segments back each step of a scan looks: 1, and then 1, 2, 4, ..."""
    num_segments = len(layout.segments_in_order)
    return [1, *(1 << n for n in range((num_segments - 1).bit_length()))]


def _scan_states(
    maps: list[StateMap],
    identity: StateMap,
    first_state: Tensor,
    reach: _Reach,
    layout: Layout,
    group: dist.ProcessGroup,
    return_state: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return what :func:`_gather_states` does, in log2 of the number of segments steps.

    In each step (Hillis and Steele, 1986) the map of some segments is joined with the map of as
    many before them. Each segment starts with the map of the segment before it, and the first one
    with the constant map to ``first_state``; so in the end all maps are constant: the states.

    Without ``return_state`` the last state is only something tied to the exchange.
    """
    segment_ranks = [segment.rank for segment in layout.segments_in_order]
    own_numbers = [n for n, rank in enumerate(segment_ranks) if rank == group.rank()]
    constant = StateMap(first_state + identity.added, torch.zeros_like(identity.kept))
    shift, *distances = _scan_distances(layout)

    earlier, identity = _exchange_maps(maps, identity, own_numbers, segment_ranks, shift, group)
    joined = [
        earlier[number].with_reach(reach.over_segments(number - 1, number))
        if number in earlier
        else constant
        for number in own_numbers
    ]
    for distance in distances:  # each map is of as many segments before its own
        earlier, identity = _exchange_maps(
            joined, identity, own_numbers, segment_ranks, distance, group
        )
        joined = [
            joined_map.after(earlier[number], reach.over_segments(number - 2 * distance, number))
            if number in earlier
            else joined_map
            for number, joined_map in zip(own_numbers, joined, strict=True)
        ]

    states = [joined_map.added for joined_map in joined]
    if not return_state:
        return states, identity.added

    # The rank of the last segment gives the state after it to all.
    has_last_segment = bool(own_numbers) and own_numbers[-1] == len(segment_ranks) - 1
    last = maps[-1](states[-1]) if has_last_segment else 0.0
    return states, AllGather.apply(last + identity.added, group)[segment_ranks[-1]]


def _exchange_maps(
    maps: list[StateMap],
    identity: StateMap,
    own_numbers: list[int],
    segment_ranks: list[int],
    distance: int,
    group: dist.ProcessGroup,
) -> tuple[dict[int, StateMap], StateMap]:
    """Fetch, for each of this rank's segments, the map of the segment ``distance`` before it.

    Args:
        maps: of this rank's segments, whose numbers in the sequence are ``own_numbers``.
        segment_ranks: the rank of every segment.

    Returns:
        The maps by the number of the segment that they are for; and the identity, tied to the
        exchange, so that every rank takes part in its backward.
    """
    num_segments = len(segment_ranks)
    # (other rank, own segment), sorted: the order of the messages is the same on both sides.
    outgoing = sorted(
        (segment_ranks[number + distance], number)
        for number in own_numbers
        if number + distance < num_segments
    )
    incoming = sorted(
        (segment_ranks[number - distance], number) for number in own_numbers if number >= distance
    )
    send_counts, receive_counts = (
        [sum(rank == other for other, _ in messages) for rank in range(group.size())]
        for messages in (outgoing, incoming)
    )

    map_of_segment = dict(zip(own_numbers, maps, strict=True))
    # The identity gives the message its shape and ties it to the graph, but is not sent.
    message = _pack([identity, *(map_of_segment[number] for _, number in outgoing)])[1:]
    received = AllToAll.apply(message, send_counts, receive_counts, group)
    numbers = [number for _, number in incoming]
    earlier = dict(zip(numbers, _unpack(received, identity), strict=True))
    return earlier, identity.tied_to(received[:0].sum())
