"""The README of an exported model."""

from ..recipe.file import to_yaml
from .check import CheckResult
from .source import SavedRun
from .target import CustomTarget, Target


def model_card(saved: SavedRun, target: Target, result: CheckResult) -> str:
    """What it is, how it is loaded, what it was trained on, and what it reached."""
    code = isinstance(target, CustomTarget)
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
        f'model = AutoModelForCausalLM.from_pretrained("."{", trust_remote_code=True" if code else ""})',
    ]
    if not saved.recipe.data.mqar:
        lines.append('tokenizer = AutoTokenizer.from_pretrained(".")')
    lines += [
        "```",
        "",
        f"Trained for {saved.step:,} steps, {saved.manifest.tokens:,} tokens, on {_data(saved)}.",
        "",
    ]
    lines += _metrics(saved)
    lines += [
        f"In fp32 its logits differ from those of the trained model by {result.whole:.0e} of the largest, and token by token "
        f"from its cache by {result.cached:.0e}.",
        "",
        "## Recipe",
        "",
        "```yaml",
        to_yaml(saved.recipe).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _data(saved: SavedRun) -> str:
    data = saved.recipe.data
    if data.mqar:
        return "multi-query associative recall"
    total = sum(data.sources.values())
    return ", ".join(f"{name} ({weight / total:.0%})" for name, weight in data.sources.items())


def _metrics(saved: SavedRun) -> list[str]:
    """The last of each kind up to the step."""
    if not saved.folder.metrics.is_file():
        return []
    last: dict[str, float] = {}
    for record in saved.folder.read_metrics():
        if record["step"] <= saved.step:
            last |= {
                name: value
                for name, value in record.items()
                if name.startswith(("train/loss", "eval/"))
            }
    if not last:
        return []
    return [
        "| metric | value |",
        "| --- | --- |",
        *(f"| {name} | {value:.4f} |" for name, value in last.items()),
        "",
    ]
