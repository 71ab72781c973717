"""A rank of ``longspan doctor``: measures how many bytes a second each rank sends to all others.

Runs under :func:`longspan.launch.ranks.run_ranks`, without arguments; the first rank prints the
result.
"""

import time

import torch
import torch.distributed as dist

from ..process import process_group

_BYTES = 64 * 2**20  # that a rank sends at a time
_REPEATS = 6  # the first is not counted


def main() -> None:
    with process_group(threads=1):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        num_ranks = dist.get_world_size()
        sent = torch.ones(_BYTES // 4 // num_ranks * num_ranks, device=device)  # fp32
        received = torch.empty_like(sent)

        seconds = []
        for _ in range(_REPEATS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(received, sent)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)

        if dist.get_rank() == 0:
            bytes_out = _BYTES * (num_ranks - 1) / num_ranks  # a rank keeps its own share
            median = sorted(seconds[1:])[2]
            print(
                f"between {num_ranks} ranks over {dist.get_backend()}: "
                f"{bytes_out / median / 1e9:.2f} GB/s out of each, all at once (all-to-all)"
            )


if __name__ == "__main__":
    main()
