"""``longspan bench launch``: what a call of attention costs the host beside its kernels."""

import json
import subprocess
import sys
from argparse import Namespace

from ...attention.patterns.expression import parse_pattern
from ...trainer.errors import UserError
from ...trainer.progress import track
from ..options import counts, out_folder
from ..table import table
from .measure import machine

_MOST_DOCUMENTS = 1000
"""The measured sequences have as many tokens."""


def bench_launch(options: Namespace) -> None:
    """Print a table, and write ``launch.json`` to ``options.out``."""
    sizes = counts(options, "heads", "kv_heads", "repeats")
    if sizes["heads"] % sizes["kv_heads"]:
        raise UserError(f"--kv-heads: {sizes['kv_heads']} does not divide --heads {sizes['heads']}")
    for number in options.documents:
        if not 1 <= number <= _MOST_DOCUMENTS:
            raise UserError(f"--documents: must be 1 to {_MOST_DOCUMENTS}, got {number}")
    for pattern in options.patterns:
        try:
            parse_pattern(pattern).check(sizes["kv_heads"], _MOST_DOCUMENTS)
        except ValueError as error:
            raise UserError(f"--patterns: {error}") from None
    out = out_folder(options)

    worker = [sys.executable, "-m", "longspan.launch.workers.host_time"]
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    cases = [(pattern, number) for pattern in options.patterns for number in options.documents]
    rows = []
    with track("calls", len(cases), of_bytes=False) as advance:
        for pattern, number in cases:
            case = [f"--pattern={pattern}", f"--documents={number}"]
            completed = subprocess.run(
                [*worker, *arguments, *case], stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append(json.loads(completed.stdout))
            advance(1)

    print(f"{machine()['device']}; medians of {sizes['repeats']}, of the processor's time in µs")
    print("ours: beside the launches of Triton kernels and the same operations of torch")
    header = ("pattern", "documents", "Triton", "torch", "first call", "bare", "ours")
    cells = [
        (
            row["pattern"],
            f"{row['documents']:,}",
            str(row["triton_launches"]),
            str(row["torch_operations"]),
            *(f"{row[name]:,.0f}" for name in ("first_us", "bare_us", "own_us")),
        )
        for row in rows
    ]
    print(table([header, *cells]))
    report = {"machine": machine(), "rows": rows}
    (out / "launch.json").write_text(json.dumps(report, indent=1) + "\n")
