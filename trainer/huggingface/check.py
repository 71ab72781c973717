"""The check that an exported model gives the run's logits: for whole prompts, token by token from
its cache, and for greedy text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .exact_angles import use_exact_angles
from .folder import abbreviated, load_folder, loading
from .model_to_export import ModelToExport
from .registry import choose_target
from .saved_run import SavedRun
from .target import Target, stays_fp32
from .tokenizer import require_same_tokens

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..engines.engine import Engine

TOLERANCE = 1e-4
"""Largest difference that is allowed, as a share of the largest logit."""
NUM_PROMPTS = 3
MIN_PROMPT_LENGTH = 1024
CACHED_TOKENS = 24
"""Tokens at the end of a prompt that are computed from the cache, one by one."""
GREEDY_TOKENS = 24
"""Tokens of greedy text for each prompt."""


@dataclass(frozen=True)
class CheckResult:
    """Largest differences between logits, as shares of the largest logit."""

    whole: float
    """Logits of whole prompts, from the run's."""
    cached: float
    """Logits of the last tokens from the cache, from those of whole prompts."""
    greedy: int
    """Tokens of greedy text that were compared and were the same."""


def check_export(folder: Path, saved: SavedRun, say: Callable[[str], None]) -> CheckResult:
    """Load ``folder`` in fp32, as a user does, and compare it with the run.

    Needs a process group of one.

    Raises:
        UserError: naming what differs, and by how much.
    """
    import torch
    from transformers import AutoConfig

    target, _ = choose_target(saved.to_export)
    with loading(str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    _require_same_architecture(folder, config, saved, target)
    num_texts = require_same_tokens(saved.recipe, folder, config)

    loaded = load_folder(folder, str(folder), dtype=torch.float32, trust_remote_code=True)
    mismatched = sorted(loaded.missing | loaded.unexpected)
    if mismatched:
        raise UserError(
            f"{folder}: its files and its config.json do not agree on {abbreviated(mismatched)}; "
            "export the run again"
        )

    use_exact_angles(loaded.model)  # or every long prompt would show their rounding
    engine = _engine(saved, target, config.dtype or torch.float32)
    try:
        result = _compare(engine, loaded.model, saved)
    finally:
        engine.close()
    _require_small_differences(folder, result, saved)
    if num_texts:
        say(f"token ids of {num_texts} texts are the same")
    say(
        f"logits of {NUM_PROMPTS} prompts differ by {result.whole:.0e} of the largest logit, those "
        f"from the cache by {result.cached:.0e}; {result.greedy} tokens of greedy text are the same"
    )
    return result


def _require_small_differences(folder: Path, result: CheckResult, saved: SavedRun) -> None:
    comparisons = {
        f"logits of whole prompts differ from those of {_described(saved)}": result.whole,
        "logits from the cache differ from those of whole prompts": result.cached,
    }
    for comparison, difference in comparisons.items():
        if not difference <= TOLERANCE:  # NaN is no small difference
            raise UserError(
                f"{folder}: {comparison} by {difference:.1e} of the largest logit; "
                f"at most {TOLERANCE:g} is allowed"
            )


def _described(saved: SavedRun) -> str:
    return f"{saved.folder.path} at step {saved.step}"


def _require_same_architecture(
    folder: Path, config: "PreTrainedConfig", saved: SavedRun, target: Target
) -> None:
    """Refuse a folder that cannot be compared with the run at all."""
    run = _described(saved)
    if config.model_type != target.model_type:
        raise UserError(
            f"{folder}: has the architecture {config.model_type}, but {run} is exported as "
            f"{target.model_type}; name a folder that this run was exported to"
        )
    vocab_size = saved.to_export.vocab_size
    if config.vocab_size != vocab_size:
        raise UserError(
            f"{folder}: has a vocabulary of {config.vocab_size:,} tokens, but {run} has one of "
            f"{vocab_size:,}; name a folder that this run was exported to"
        )


def _engine(saved: SavedRun, target: Target, dtype: "torch.dtype") -> "Engine":
    """Return the run's model in fp32, with its weights rounded as those in the folder are."""
    import torch

    from ..engines.inference import with_weights

    weights = saved.weights(list(saved.shapes))
    if dtype != torch.float32:
        for tensor_map in target.tensor_maps():
            weight = weights[tensor_map.megatron_name]
            rounded = {
                name: tensor if stays_fp32(name) else tensor.to(dtype)
                for name, tensor in tensor_map.to_hf(weight).items()
            }
            weights[tensor_map.megatron_name] = tensor_map.from_hf(rounded, weight.shape)
    training = saved.recipe.training.model_copy(update={"dtype": "float32"})
    return with_weights(saved.recipe.model_copy(update={"training": training}), weights)


def prompt_length(to_export: ModelToExport) -> int:
    """Return how many tokens a prompt has, so that a wrong pattern shows.

    This is twice as far as any window, band or first token of the stack reaches and as its stripes
    are apart; at least ``MIN_PROMPT_LENGTH``, and never more than the model was trained on.
    """
    num_kv_heads = to_export.model.kv_heads
    rules = [rule for block in to_export.model.stack for rule in block.rules(num_kv_heads)]
    reaches = [
        max((rule.reach or 1) * rule.block, rule.stop or 1, rule.step * rule.block)
        for rule in rules
    ]
    wanted = max([MIN_PROMPT_LENGTH, *(2 * reach for reach in reaches)])
    return min(to_export.seq_length, wanted)


def _compare(engine: "Engine", hf_model: "PreTrainedModel", saved: SavedRun) -> CheckResult:
    import torch

    length = prompt_length(saved.to_export)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PROMPTS, length)
    prompts = torch.randint(saved.to_export.vocab_size, shape, generator=generator)
    with torch.no_grad():
        reference = engine.logits(prompts)  # [prompts, length, vocab]
        whole = hf_model(input_ids=prompts, use_cache=False).logits.float()
        cached = _logits_from_cache(hf_model, prompts)  # [prompts, cached tokens, vocab]
        largest = reference.abs().max()

        start = prompts[:, : max(1, length - GREEDY_TOKENS)]
        text = hf_model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        _require_same_text(engine, text, start.shape[1], largest, saved)
    return CheckResult(
        whole=float((whole - reference).abs().max() / largest),
        cached=float((cached - whole[:, -cached.shape[1] :]).abs().max() / largest),
        greedy=text[:, start.shape[1] :].numel(),
    )


def _logits_from_cache(hf_model: "PreTrainedModel", tokens: "Tensor") -> "Tensor":
    """Return the logits of the last tokens: one call for all tokens before, and one for each."""
    import torch

    num_cached = min(CACHED_TOKENS, tokens.shape[1] // 2)
    first = tokens.shape[1] - num_cached
    outputs = hf_model(input_ids=tokens[:, :first], use_cache=True)
    logits = []
    for position in range(first, tokens.shape[1]):
        # Positions as `generate` passes them: if its first layer is a lightning one, `minimax` does
        # not know how many tokens came before.
        outputs = hf_model(
            input_ids=tokens[:, position : position + 1],
            position_ids=torch.full((len(tokens), 1), position),
            past_key_values=outputs.past_key_values,
            use_cache=True,
        )
        logits.append(outputs.logits[:, -1])
    return torch.stack(logits, 1).float()


def _require_same_text(
    engine: "Engine", text: "Tensor", start: int, largest: "Tensor", saved: SavedRun
) -> None:
    """Require that every token from ``start`` on is the run's likeliest; if two are equally likely
    up to rounding, either is.
    """
    logits = engine.logits(text)[:, start - 1 : -1]  # [prompts, greedy tokens, vocab]
    chosen = logits.gather(-1, text[:, start:, None])[..., 0]
    differences = (logits.amax(-1) - chosen) / largest  # [prompts, greedy tokens]
    worst = float(differences.max())
    if worst > TOLERANCE:
        index = int(differences.amax(0).argmax())
        raise UserError(
            f"{saved.folder.path}: greedy text differs from the run's at token {index + 1}: its "
            f"logit is lower than the likeliest token's by {worst:.1e} of the largest logit"
        )
