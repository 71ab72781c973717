"""What first_light.sh writes about the machine and the memory of a training.

Arguments: ``machine``; ``device``, the GPU's name for ``longspan plan``; or ``memory FOLDER``.
"""

import json
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "deepspeed",
    "transformers",
    "flash-attn",
    "flash-linear-attention",
)


def version_or_none(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def machine() -> None:
    """Print a list of the card and the versions."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        size = gpu.total_memory / 2**30
        print(f"- card: {gpu.name}, {size:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
        print(f"- CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    else:
        print(f"- card: none; {platform.machine()}")
    print(f"- python {platform.python_version()}")
    print("\n".join(f"- {package} {version_or_none(package)}" for package in PACKAGES))


def device() -> None:
    """Print the name of the GPU here, or of the nearest one that ``longspan plan`` knows."""
    from longspan.trainer.predict.estimate import DEVICES

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    words = re.sub(r"[^a-z0-9]", "", name.lower())
    known = [known for known in DEVICES if known in words]
    print(max(known, key=len, default="h100"))


def memory(folder: Path) -> None:
    """Print what a training took of the GPU's memory beside what was predicted."""
    taken = [
        record["memory/max_reserved_gib"]
        for line in read(folder / "memory" / "metrics.jsonl").splitlines()
        if "memory/max_reserved_gib" in (record := json.loads(line))
    ]
    planned = re.search(r"^memory +([\d.,]+) of", read(folder / "plan.log"), re.M)
    found = json.loads(read(folder / "rehearsal.json") or "{}")
    rows = {
        "reserved by the training": f"{max(taken):.2f} GiB" if taken else "not measured",
        "longspan plan": f"{planned[1]} GiB" if planned else "not known",
        "longspan rehearse": f"{found['peak_bytes'] / 2**30:.2f} GiB" if found else "not known",
    }
    print("\n| memory at the peak | |\n| --- | --- |")
    print("\n".join(f"| {name} | {size} |" for name, size in rows.items()))


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["machine"]:
            machine()
        case ["device"]:
            device()
        case ["memory", folder]:
            memory(Path(folder))
        case _:
            sys.exit(__doc__)
