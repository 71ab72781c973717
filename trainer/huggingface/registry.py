"""Every architecture that models are exported as and imported from: a new one is a line here."""

from ..errors import UserError
from .custom_target import CustomTarget
from .model_to_export import ModelToExport
from .native.base import NativeTarget
from .native.granite import GraniteHybrid
from .native.llama import Llama, Ministral, Mistral
from .native.minimax import MiniMax
from .native.olmo import OlmoHybrid
from .native.qwen import Qwen3, Qwen35
from .target import Target

NATIVE_TARGETS: tuple[type[NativeTarget], ...] = (
    Llama,
    Mistral,
    Ministral,
    Qwen3,
    MiniMax,
    Qwen35,
    OlmoHybrid,
    GraniteHybrid,
)
"""The architectures of transformers, in the order in which they are tried."""


def choose_target(to_export: ModelToExport) -> tuple[Target, list[str]]:
    """Choose the native architecture that the model is exactly, or else code of its own.

    Returns:
        The target, and why the native architectures with these kinds of layer did not match.

    Raises:
        UserError: naming a block that no exported code can compute.
    """
    for name, block in to_export.model.layers.blocks.items():
        problem = block.export_problem()
        if problem:
            raise UserError(
                f"model.layers.blocks.{name}: {block.kind()} {problem}; "
                "use another mixer if the model is to be exported"
            )

    reasons = []
    for native_class in NATIVE_TARGETS:
        target = native_class(to_export)
        if not target.has_all_kinds():
            continue
        mismatches = list(dict.fromkeys(target.mismatches()))  # without repetitions
        if not mismatches:
            return target, []
        reasons.append(f"{target.model_type} cannot express {', '.join(mismatches[:3])}")
    return CustomTarget(to_export), reasons


def describe_target(to_export: ModelToExport) -> str:
    """Return one line: which architecture the model is exported as, and why it is no other one; or
    why it cannot be exported.
    """
    try:
        target, reasons = choose_target(to_export)
    except UserError as error:
        return f"cannot export this model: {error}"
    if not target.ships_code:
        return f"writes a transformers model of architecture {target.model_type}"
    why = "; ".join(reasons) or "no architecture of transformers combines these layers"
    return f"writes a model with custom code (trust_remote_code=True): {why}"
