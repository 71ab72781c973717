"""One gloo rank: the operations over a layout in which ranks hold different numbers of tokens.

One holds none. Argument: OUT.
"""

import sys

import torch
import torch.distributed as dist
from longspan import parallel
from longspan.attention import S2
from longspan.parallel import Layout

LAYOUT = Layout((((0, 1), (40, 52)), (), ((1, 30),), ((30, 33), (33, 40))))
IDS = torch.tensor([0] * 5 + [1] * 25 + [2] * 10 + [3] * 12).expand(2, -1).int()
PATTERN, DECAY = S2(4, 2, 3), torch.tensor([0.0, -0.3], dtype=torch.float64)


def inputs() -> list[torch.Tensor]:
    """Queries, keys, values and the upstream gradient, of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 52, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4)]


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    *own, upstream = (LAYOUT.shard(x, rank) for x in inputs())
    found = []
    for operation in (
        lambda q, k, v: parallel.attend(q, k, v, PATTERN, LAYOUT, group, documents=IDS),
        lambda q, k, v: parallel.linear_attention(
            q, k, v, LAYOUT, group, decay=DECAY, documents=IDS
        ),
        lambda q, k, v: parallel.linear_attention(
            q, k * 0.3, v, LAYOUT, group, beta=v.sigmoid()[..., 0], documents=IDS
        ),
    ):
        leaves = [x.clone().requires_grad_() for x in own]
        result = operation(*leaves)
        found.append([result.detach(), *torch.autograd.grad(result, leaves, upstream)])
    torch.save(found, f"{out}-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
