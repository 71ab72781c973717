"""Whether an exported model gives the run's logits: whole prompts, token by token from its cache, and greedy text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..layers.softmax import SoftmaxBlock
from .folder import listed, load_folder, loading
from .native import ModelToExport
from .source import SavedRun
from .target import Target, choose_target, stays_fp32

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from ..engines.engine import Engine

TOLERANCE = 1e-4
PROMPTS, LENGTH, CACHED, GREEDY = 3, 1024, 24, 24


@dataclass(frozen=True)
class CheckResult:
    """Differences as shares of the largest logit."""

    whole: float
    """Of logits of whole prompts from the run's."""
    cached: float
    """Of logits token by token, after half a prompt, from those of whole prompts."""
    greedy: int
    """Tokens of likeliest text that were compared, and were the same."""


def check_export(folder: Path, saved: SavedRun, say: Callable[[str], None]) -> CheckResult:
    """Load ``folder`` as a user does, in fp32, and compare; needs a process group of one.

    Raises:
        UserError: naming what differs, and by how much.
    """
    import torch
    from transformers import AutoConfig

    target, _ = choose_target(saved.source)
    with loading(str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    _require_same_kind(folder, config, saved, target)
    theirs = load_folder(folder, str(folder), dtype=torch.float32, trust_remote_code=True)
    if other := sorted(theirs.missing | theirs.unexpected):
        raise UserError(
            f"{folder}: its files and its config.json do not agree on {listed(other)}; export the run again"
        )
    ours = _engine(saved, target, config.dtype or torch.float32)
    try:
        result = _compare(ours, theirs.model, saved)
    finally:
        ours.close()
    for what, found in {"whole prompts": result.whole, "token by token": result.cached}.items():
        if not found <= TOLERANCE:
            raise UserError(
                f"{folder}: {what}, logits differ by {found:.1e} of the largest from those of {saved.folder.path} at step "
                f"{saved.step}; {TOLERANCE:g} is allowed"
            )
    say(
        f"logits of {PROMPTS} prompts differ by {result.whole:.0e} of the largest, from the cache by {result.cached:.0e}; "
        f"{result.greedy} tokens of greedy text are the same"
    )
    return result


def _require_same_kind(
    folder: Path, config: "PreTrainedConfig", saved: SavedRun, target: Target
) -> None:
    """What would not be compared to its end."""
    of = f"{saved.folder.path} at step {saved.step}"
    if config.model_type != target.model_type:
        raise UserError(
            f"{folder}: is a model of architecture {config.model_type}; {of} becomes {target.model_type}"
        )
    if config.vocab_size != saved.source.vocab_size:
        raise UserError(
            f"{folder}: has a vocabulary of {config.vocab_size:,}, {of} has one of {saved.source.vocab_size:,}"
        )


def _engine(saved: SavedRun, target: Target, dtype: "torch.dtype") -> "Engine":
    import torch

    from ..engines.inference import with_weights

    weights = saved.weights(list(saved.shapes))
    if dtype != torch.float32:  # as they were rounded when they were written
        for rows in target.rows():
            theirs = {
                name: part if stays_fp32(name) else part.to(dtype)
                for name, part in rows.split(weights[rows.ours]).items()
            }
            weights[rows.ours] = rows.join(theirs, weights[rows.ours].shape)
    exact = saved.recipe.training.model_copy(update={"dtype": "float32"})
    return with_weights(saved.recipe.model_copy(update={"training": exact}), weights)


def prompt_length(source: ModelToExport) -> int:
    """Tokens: twice as far as any window, band or sink of the stack reaches and as its stripes lie apart, so that a wrong one
    shows; at least ``LENGTH``, and never more than the model was made for.
    """
    heads = source.model.kv_heads
    patterns = [
        block.attention_pattern(heads)
        for block in source.model.stack
        if isinstance(block, SoftmaxBlock)
    ]
    rules = {rule for pattern in patterns for head in range(heads) for rule in pattern.rules(head)}
    ends = [
        max((rule.reach or 1) * rule.block, rule.stop or 1, rule.step * rule.block)
        for rule in rules
    ]
    return min(source.seq_length, max([LENGTH, *(2 * end for end in ends)]))


def _compare(ours: "Engine", theirs: "nn.Module", saved: SavedRun) -> CheckResult:
    import torch

    length, vocabulary = prompt_length(saved.source), saved.source.vocab_size
    prompts = torch.randint(
        vocabulary, (PROMPTS, length), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        reference = ours.logits(prompts)
        whole = theirs(input_ids=prompts, use_cache=False).logits.float()
        cached = _from_cache(theirs, prompts)
        largest = reference.abs().max()
        start = prompts[:, : max(1, length - GREEDY)]
        text = theirs.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=GREEDY,
            do_sample=False,
            eos_token_id=None,
        )
        _same_text(ours, text, start.shape[1], largest, saved)
    return CheckResult(
        float((whole - reference).abs().max() / largest),
        float((cached - whole[:, -cached.shape[1] :]).abs().max() / largest),
        text[:, start.shape[1] :].numel(),
    )


def _from_cache(theirs: "nn.Module", tokens: "Tensor") -> "Tensor":
    """Of the last tokens: one call for what comes first, and one for each of them."""
    import torch

    count = min(CACHED, tokens.shape[1] // 2)
    first = tokens.shape[1] - count
    outputs = theirs(input_ids=tokens[:, :first], use_cache=True)
    found = []
    for place in range(first, tokens.shape[1]):
        # As `generate` has them: `minimax` does not know how many came before where its first layer is a lightning one.
        at = torch.full((len(tokens), 1), place)
        token, cache = tokens[:, place : place + 1], outputs.past_key_values
        outputs = theirs(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True)
        found.append(outputs.logits[:, -1])
    return torch.stack(found, 1).float()


def _same_text(
    ours: "Engine", text: "Tensor", start: int, largest: "Tensor", saved: SavedRun
) -> None:
    """Every token after the prompt is the run's likeliest; where two are as likely up to rounding, either."""
    logits = ours.logits(text)[:, start - 1 : -1]
    chosen = logits.gather(-1, text[:, start:, None])[..., 0]
    behind = (logits.amax(-1) - chosen) / largest
    if float(behind.max()) > TOLERANCE:
        at = int(behind.amax(0).argmax())
        raise UserError(
            f"{saved.folder.path}: greedy text differs from the run's at token {at + 1}, whose logit is "
            f"{float(behind.max()):.1e} of the largest below the likeliest"
        )
