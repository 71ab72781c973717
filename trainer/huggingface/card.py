"""The README of an exported model."""

from ..recipe.file import to_yaml
from .check import CheckResult
from .saved_run import SavedRun
from .target import Target


def model_card(saved: SavedRun, target: Target, result: CheckResult) -> str:
    """Return what the model is, how it is loaded, what it was trained on and what it reached."""
    load_options = ", trust_remote_code=True" if target.ships_code else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {saved.folder.path.name}",
        "",
        saved.recipe.description or f"A model trained with longspan, as `{target.model_type}`.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{load_options})',
    ]
    if not saved.recipe.data.mqar:  # which has no text
        lines.append('tokenizer = AutoTokenizer.from_pretrained(".")')
    lines += [
        "```",
        "",
        f"Trained for {saved.step:,} steps, {saved.manifest.tokens:,} tokens, on {_data(saved)}.",
        "",
        *_metrics(saved),
        f"In fp32 its logits differ from those of the trained model by {result.whole:.0e} of the "
        f"largest, and token by token from its cache by {result.cached:.0e}.",
        "",
        "## Recipe",
        "",
        "```yaml",
        to_yaml(saved.recipe).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _data(saved: SavedRun) -> str:
    """Return what it was trained on, in words."""
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
