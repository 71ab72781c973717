"""Linear attention over the ranks that share a sequence: only states move."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import attention
from ..attention.documents import check_documents
from ..attention.linear.attention import check_linear, state_map
from .collectives import AllGather, AllToAll, check_shard
from .layout import Layout


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
    """:func:`longspan.attention.linear_attention` of a sequence that is spread over ``group``; every rank calls it.

    A segment of the layout maps the state before it to the one after it, ``S -> A S + B``, where ``A`` is a factor per head or
    key, with the delta rule a matrix, and 0 across a document's edge (LASP-2, arXiv 2502.07563). Only these maps move, in fp32
    (fp64 for fp64), each as large as a state or two whatever the length; autograd gives the transpose of it for backward.

    Args:
        q, k, v, beta: this rank's tokens, as ``layout`` places them: ``[batch, local time, heads, dim]``, possibly none.
        decay: ``[heads]``, or of this rank's tokens.
        layout: of the sequence over the ranks of ``group``.
        state: before the sequence's first token, the same on every rank; its gradient is this rank's share.
        documents: int ``[batch, time]`` of the **whole** sequence, the same on every rank.
        schedule: ``gather`` (all maps on every rank), ``scan`` (log2 of the number of segments steps) or ``auto``.

    Returns:
        This rank's tokens of the output, and where asked for the state after the whole sequence's last token, on every rank.
        Gradients are those of the sum of all ranks' losses.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_linear(q, k, v, decay, beta, state, backend)
    check_shard(layout, group, q.shape[1])
    documents = check_documents(documents, (q.shape[0], layout.length))
    if schedule not in ("auto", "gather", "scan"):
        raise ValueError(f"schedule must be auto, gather or scan, got {schedule!r}")
    if layout.ranks == 1:
        return attention.linear_attention(
            q, k, v, decay=decay, beta=beta, scale=scale, state=state, documents=documents, return_state=return_state,
            backend=backend,
        )  # fmt: skip
    rank = group.rank()

    def piece(x: Tensor | None, at: slice) -> Tensor | None:
        return x if x is None or x.ndim == 1 else x[:, at]

    own, maps = [], []
    for start, stop, _, slot in layout.segments_of_rank[rank]:
        at, ids = (
            slice(slot, slot + stop - start),
            None if documents is None else documents[:, start:stop],
        )
        own.append((q[:, at], k[:, at], v[:, at], piece(decay, at), piece(beta, at), ids))
        kept, added = state_map(*own[-1][1:], backend=backend)
        maps.append(StateMap(added, kept * _same_document_before(documents, start)))
    nothing = piece(decay, slice(0, 0)), piece(beta, slice(0, 0)), None
    kept, added = state_map(k[:, :0], v[:, :0], *nothing, backend=backend)
    # Backward is a collective, so that a rank without tokens has its part in the exchange too: what it sends depends on its
    # inputs, and its output on what it receives.
    tie = sum(x[:, :0].sum() for x in (q, k, v, beta, decay) if x is not None and x.ndim > 1)
    first = torch.zeros_like(added) if state is None else state.to(added.dtype)
    identity = StateMap(added + tie + first[:0].sum(), kept)
    use = _scan if schedule == "scan" or (schedule == "auto" and scan_steps(layout)) else _gather
    before, last = use(maps, identity, first, layout, group, return_state)

    outs = [v[:, :0] + last[:0].sum().to(v.dtype)]
    for (q_s, k_s, v_s, decay_s, beta_s, ids), (start, _, _, _), current in zip(
        own, layout.segments_of_rank[rank], before, strict=True
    ):
        current = current * _same_document_before(documents, start)
        options = {
            "decay": decay_s,
            "beta": beta_s,
            "scale": scale,
            "state": current,
            "documents": ids,
            "backend": backend,
        }
        outs.append(attention.linear_attention(q_s, k_s, v_s, **options))
    out = torch.cat(outs, 1)
    return (out, last) if return_state else out


def scan_steps(layout: Layout) -> int:
    """Steps of a scan, where it moves less than half of what a gather does, which has but one; else 0."""
    steps = len(_distances(layout))
    return steps if 2 * steps < layout.ranks - 1 else 0


class StateMap(NamedTuple):
    """``S -> kept S + added``; ``kept`` is a factor of each row, ``[..., key_dim, 1]``, or a matrix."""

    added: Tensor
    kept: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        return self.added + self._keep(state)

    def after(self, other: "StateMap") -> "StateMap":
        """The map that does ``other`` first."""
        return StateMap(self(other.added), self._keep(other.kept))

    def _keep(self, x: Tensor) -> Tensor:
        return self.kept * x if self.kept.shape[-1] == 1 else self.kept @ x


def _same_document_before(documents: Tensor | None, start: int) -> Tensor | float:
    """1 where the document before a segment's first token is that of the token, else 0: ``[batch, 1, 1, 1]``."""
    if documents is None or not start:
        return 1.0
    return (documents[:, start] == documents[:, start - 1])[:, None, None, None]


def _stacked(maps: list[StateMap]) -> Tensor:
    return torch.stack([torch.cat(one, -1) for one in maps])


def _parts(message: Tensor, like: StateMap) -> list[StateMap]:
    return [
        StateMap(*one.split([like.added.shape[-1], like.kept.shape[-1]], -1)) for one in message
    ]


def _gather(
    maps: list[StateMap],
    identity: StateMap,
    first: Tensor,
    layout: Layout,
    group: dist.ProcessGroup,
    last: bool,
):
    """The states before this rank's segments, and where ``last`` that after all: all maps on every rank, applied in turn."""
    most = max(map(len, layout.segments))
    gathered = AllGather.apply(_stacked(maps + [identity] * (most - len(maps))), group)
    maps_of = [iter(_parts(own, identity)) for own in gathered]
    before, current = [], first + gathered[:0].sum()
    for _, _, holder, _ in layout.segments_in_order:
        if holder == group.rank():
            before.append(current)
        current = next(maps_of[holder])(current)
    return before, current


def _distances(layout: Layout) -> list[int]:
    """How far the steps of a scan reach, in segments."""
    return [1, *(1 << n for n in range((len(layout.segments_in_order) - 1).bit_length()))]


def _scan(
    maps: list[StateMap],
    identity: StateMap,
    first: Tensor,
    layout: Layout,
    group: dist.ProcessGroup,
    last: bool,
):
    """The same in log2 of the number of segments steps, in each of which a map meets that of twice as many segments before it.

    Hillis and Steele (1986). Each segment starts with the map of the one before it, the first with what makes any state
    ``first``; so the last maps are constant.
    """
    holders = [holder for _, _, holder, _ in layout.segments_in_order]
    mine = [n for n, holder in enumerate(holders) if holder == group.rank()]
    whole = StateMap(first + identity.added, torch.zeros_like(identity.kept))
    shift, *distances = _distances(layout)
    own = maps
    found, identity = _exchange_maps(maps, identity, mine, holders, shift, group)
    maps = [found.get(n, whole) for n in mine]
    for distance in distances:
        found, identity = _exchange_maps(maps, identity, mine, holders, distance, group)
        maps = [
            one.after(found[n]) if n in found else one for n, one in zip(mine, maps, strict=True)
        ]
    before = [one.added for one in maps]
    if not last:
        return before, identity.added
    behind = own[-1](before[-1]) if mine and mine[-1] == len(holders) - 1 else 0.0
    return before, AllGather.apply(behind + identity.added, group)[holders[-1]]


def _exchange_maps(
    maps, identity: StateMap, mine: list[int], holders: list[int], distance: int, group
):
    """For each of this rank's segments the map of the one ``distance`` before it; and the identity, tied to the exchange."""
    to = sorted((holders[n + distance], n) for n in mine if n + distance < len(holders))
    come = sorted((holders[n - distance], n) for n in mine if n >= distance)
    send, receive = (
        [sum(rank == other for other, _ in part) for rank in range(group.size())]
        for part in (to, come)
    )
    at = {n: i for i, n in enumerate(mine)}
    sent = _stacked([identity, *(maps[at[n]] for _, n in to)])[1:]
    received = AllToAll.apply(sent, send, receive, group)
    found = {n: one for (_, n), one in zip(come, _parts(received, identity), strict=True)}
    return found, identity._replace(added=identity.added + received[:0].sum())
