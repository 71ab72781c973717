"""Run the operations on one gloo rank, over a layout whose ranks hold unequal numbers of tokens.

One rank holds none. Argument: OUT.
"""

import sys

import torch
import torch.distributed as dist
from longspan import parallel
from longspan.attention import S2
from longspan.parallel import Layout

LAYOUT = Layout((((0, 1), (40, 52)), (), ((1, 30),), ((30, 33), (33, 40))))
IDS = torch.tensor([0] * 5 + [1] * 25 + [2] * 10 + [3] * 12).expand(2, -1).int()
PATTERN = S2(4, 2, 3)
DECAY = torch.tensor([0.0, -0.3], dtype=torch.float64)


def inputs() -> list[torch.Tensor]:
    """Return queries, keys, values and the upstream gradient of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 52, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4)]


def main(out_prefix: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = dist.group.WORLD
    *local_inputs, upstream = (LAYOUT.shard(x, rank) for x in inputs())
    results = []
    for operation in (
        lambda q, k, v: parallel.attend(q, k, v, PATTERN, LAYOUT, group, documents=IDS),
        lambda q, k, v: parallel.linear_attention(
            q, k, v, LAYOUT, group, decay=DECAY, documents=IDS
        ),
        lambda q, k, v: parallel.linear_attention(
            q, k * 0.3, v, LAYOUT, group, beta=v.sigmoid()[..., 0], documents=IDS
        ),
    ):
        leaves = [x.clone().requires_grad_() for x in local_inputs]
        out = operation(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    torch.save(results, f"{out_prefix}-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
