"""The README of an exported model."""

from ..recipe.file import to_yaml
from .check import CheckResult
from .saved_run import SavedRun
from .target import Target


def model_card(saved: SavedRun, target: Target, result: CheckResult) -> str:
    """Return what the model is, how to load it, its training data, its metrics and its recipe."""
    load_options = ", trust_remote_code=True" if target.ships_code else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {saved.folder.path.name}",
        "",
        saved.recipe.description
        or f"A model trained with longspan and exported as `{target.model_type}`.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{load_options})',
    ]
    if not saved.recipe.data.mqar:  # its tokens are not text, so there is no tokenizer
        lines.append('tokenizer = AutoTokenizer.from_pretrained(".")')
    lines += [
        "```",
        "",
        f"Trained for {saved.step:,} steps ({saved.manifest.tokens:,} tokens) on {_data(saved)}.",
        "",
        *_metrics(saved),
        "When the export was checked in fp32, its logits differed from those of the trained model "
        f"by at most {result.whole:.0e} of the largest logit. Logits computed token by token from "
        f"the cache differed from those of whole prompts by at most {result.cached:.0e}.",
        "",
        "## Recipe",
        "",
        "```yaml",
        to_yaml(saved.recipe).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _data(saved: SavedRun) -> str:
    """Return the names and shares of the training data."""
    sources = saved.recipe.data.sources
    if saved.recipe.data.mqar or sources is None:
        return "multi-query associative recall"
    total = sum(sources.values())
    return ", ".join(f"{name} ({weight / total:.0%})" for name, weight in sources.items())


def _metrics(saved: SavedRun) -> list[str]:
    """Return a table of the last value of each loss and evaluation up to the checkpoint's step."""
    if not saved.folder.metrics.is_file():
        return []
    last: dict[str, float] = {}
    for record in saved.folder.read_metrics():
        if record["step"] > saved.step:
            continue
        for name, value in record.items():
            if name.startswith(("train/loss", "eval/")):
                last[name] = value
    if not last:
        return []
    values = [f"| {name} | {value:.4f} |" for name, value in last.items()]
    return ["| metric | value |", "| --- | --- |", *values, ""]
