"""A process that prints by how many bytes its memory grows while it runs a candidate.

On CUDA the growth is that of the memory in use there. See
:func:`longspan.launch.bench.measure.fresh_process_peak`.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..bench.measure import ForwardBackward, cuda_peak, device

Build = Callable[[dict, int | None], ForwardBackward]
"""``build(candidate, max_tokens)``: the call of a candidate, cut to ``max_tokens`` if given."""


def _attention() -> Build:
    from ..bench.attention import build_candidate

    return build_candidate


def _linear() -> Build:
    from ..bench.linear import build_candidate

    return build_candidate


def _memory() -> Build:
    from ..bench.memory import build_candidate

    return build_candidate


BUILDERS: dict[str, Callable[[], Build]] = {
    "attention": _attention,
    "linear": _linear,
    "memory": _memory,
}
"""Of each benchmark; a function imports it, so that no other benchmark's memory is measured."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("benchmark", choices=BUILDERS)
    parser.add_argument("candidate", type=json.loads, help="JSON of the benchmark's own")
    parser.add_argument("warmup_tokens", type=int, help="of a shorter call before")
    options = parser.parse_args()

    build = BUILDERS[options.benchmark]()
    build(options.candidate, options.warmup_tokens)()
    call = build(options.candidate, None)
    print(cuda_peak(call) if device() == "cuda" else _resident_peak(call))


def _resident_peak(call: ForwardBackward) -> int:
    """Return by how many bytes the resident memory of this process grows while it runs."""
    # The highest resident size so far becomes what is in use now. If that is not permitted, they
    # hardly differ.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _highest_resident_size()
    call()
    return _highest_resident_size() - before


def _highest_resident_size() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
