"""The model card beside a saved model: README.md, in the form that the Hugging Face Hub reads.

Its front matter is YAML: https://huggingface.co/docs/hub/model-cards. What names this machine or its directories isn't
in the card, which is meant to be published.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..replacing import replace_file
from .describing import describe, describe_module
from .facts import versions
from .history import ABOUT_EVALUATION
from .run_file import NAME as RECORD
from .run_file import plain, read_record

CARD = "README.md"
MARK = "<!-- Written by stratagem, which writes it anew when the model is saved again. Remove this line to keep it. -->"
LEFT_OUT = (
    "output_dir",
    "progress",
    "report",
)  # arguments: places of this machine, and what shows nothing of the model
PLAIN = re.compile(
    r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[A-Za-z][\w./-]*$", re.IGNORECASE
)  # text that YAML needs no quotes for
MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?$")  # the name of a model on the Hub
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
}
"""What a class of transformers is for, by the end of its name."""
GENERIC = ("arrow", "csv", "generator", "json", "pandas", "parquet", "text", "webdataset")
"""Builders of the package datasets that say how data was read, and not which."""


def is_free(directory: Path) -> bool:
    """Whether a card may be written into a directory: there is none, or one of ours."""
    try:
        return MARK in (directory / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def write_card(fit: Any, directory: Path, weights: Any = None) -> None:
    """Write the card of a Fit's module.

    Args:
        fit: its module is placed.
        directory: that the model was saved in.
        weights: the Average whose weights were saved; None for the module's own.
    """
    replace_file(directory / CARD, card_of(fit, directory.resolve().name, weights))


def card_of(fit: Any, name: str, weights: Any = None) -> str:
    """Write the text of a card.

    Args:
        fit: its module is placed.
        name: of the model, where the run has none.
        weights: see ``write_card``.
    """
    name = fit.args.run_name or name
    was_trained = fit.train_data is not None and fit.state.global_step > 0 and not fit.weights_are_loaded
    evaluation = evaluation_of(fit, weights is not None) if was_trained else {}
    lines = [*yaml_lines(front_matter(fit, name, evaluation))]
    parts = [f"# {name}", MARK, "## Model", *bullets(about_model(fit))]
    if was_trained:
        facts = plain(describe(fit))
        parts += ["## Training", *bullets(about_training(fit, facts, weights))]
        parts += ["Arguments other than their defaults:", table(("argument", "value"), arguments_of(facts))]
        totals = {key: value for key, value in fit.run.results.items() if "_memory_" not in key}
        if evaluation:
            parts += ["## Evaluation", f"On {evaluation_data(fit)}.", table(("metric", "value"), evaluation)]
        if totals:
            parts += ["## Totals", table(("number", "value"), totals)]
    parts += ["## Versions", table(("package", "version"), versions())]
    return "\n".join(["---", *lines, "---", "", "\n\n".join(filter(None, parts)), ""])


def front_matter(fit: Any, name: str, evaluation: Mapping[str, float]) -> dict[str, Any]:
    """What the Hub reads."""
    module = fit.module
    adapters = getattr(module, "peft_config", None)
    base = base_of(module)
    task = task_of(module)
    kind = getattr(getattr(module, "config", None), "model_type", None)
    found: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    if base:
        found["base_model"] = base
        found["base_model_relation"] = "adapter" if adapters else "finetune"
    if task:
        found["pipeline_tag"] = task
    found["tags"] = ["stratagem", *([kind] if isinstance(kind, str) and kind else []), *(["lora"] if adapters else [])]
    if evaluation:
        data = evaluation_data(fit)
        metrics = [{"name": key, "type": key, "value": value} for key, value in evaluation.items()]
        result = {
            "task": {"type": task or "other"},
            "dataset": {"name": data, "type": "custom"},
            "metrics": metrics,
        }
        found["model-index"] = [{"name": name, "results": [result]}]
    return found


def base_of(module: Any) -> str | None:
    """The name on the Hub of the model that was fine-tuned; None where it isn't known, or is a directory here."""
    configs = (getattr(module, "peft_config", None) or {}).values()
    names = [getattr(config, "base_model_name_or_path", None) for config in configs]
    names.append(getattr(getattr(module, "config", None), "_name_or_path", None))
    for name in names:
        if isinstance(name, str) and MODEL.match(name) and not Path(name).exists():
            return name
    return None


def task_of(module: Any) -> str | None:
    """What the model is for, by its class or by the one under adapters."""
    model = module.get_base_model() if getattr(module, "peft_config", None) else module
    classes = [each.__name__ for each in type(model).__mro__]
    return next((task for end, task in TASKS.items() for name in classes if name.endswith(end)), None)


def evaluation_of(fit: Any, of_average: bool) -> dict[str, float]:
    """The numbers of the evaluation of these very weights; empty where there was none."""
    state, args = fit.state, fit.args
    update = state.global_step
    if args.load_best_model_at_end and state.best_metric is not None and "train_loss" in fit.run.results:
        update = state.best_global_step
    found: dict[str, float] = {}
    for line in state.log_history:
        if line.get("step") == update:
            found |= {key: value for key, value in line.items() if key.startswith("eval_")}
    return {
        key: value
        for key, value in found.items()
        if key.startswith("eval_average_") == of_average
        and not is_about_machine(key)
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


def is_about_machine(key: str) -> bool:
    """Whether a number of an evaluation says nothing of the model: times, rates, memory."""
    return bool(ABOUT_EVALUATION.search(key)) or "_memory_" in key


def about_model(fit: Any) -> dict[str, Any]:
    """What the model is."""
    module = describe_module(fit)
    base = base_of(fit.module)
    found = {
        "Class": f"`{module['class']}`",
        "Parameters": f"{module['trainable'] + module['frozen']:,}, {module['trainable']:,} of them trained",
    }
    if base:
        found["Base model"] = f"`{base}`"
    if fit.loaded_weights:
        verb = "Weights" if fit.weights_are_loaded else "Began with the weights of"
        found[verb] = f"`{fit.loaded_weights}`"
    return found


def about_training(fit: Any, facts: Mapping[str, Any], weights: Any) -> dict[str, Any]:
    """How it was trained."""
    state = fit.state
    device = f"{facts['device']['kind']}, {facts['device']['name']}"
    ranks = f"{facts['world_size']} rank{'s' * (facts['world_size'] != 1)}"
    found = {
        "Data": data_name(fit.train_data),
        "Updates": f"{state.global_step:,}, of {facts['samples_per_update']:,} samples each",
        "Epochs": f"{state.epoch:.3g}",
        "Strategy and precision": f"`{facts['strategy']['name']}`, `{facts['precision']['name']}`, {ranks} ({device})",
    }
    if fit.args.load_best_model_at_end and state.best_metric is not None and "train_loss" in fit.run.results:
        found["Weights"] = f"of update {state.best_global_step:,}, the best by {fit.args.best_metric}"
    if weights is not None:
        found["Weights"] = f"averaged: `{weights!r}`"
    record = read_record(Path(fit.args.output_dir) / RECORD)
    git = record.get("git")
    if isinstance(git, dict) and git.get("commit") and fit.args.report:
        found["Program"] = f"commit `{git['commit']}`{'' if git.get('is_clean') else ', with changes'}"
    return found


def arguments_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that aren't the defaults, but for paths of this machine."""
    given = facts["arguments"]["given"]
    return {name: given[name] for name in facts["arguments"]["not_defaults"] if name not in LEFT_OUT}


def evaluation_data(fit: Any) -> str:
    """What was evaluated on."""
    data = fit.eval_data
    if isinstance(data, Mapping):
        return ", ".join(map(str, data))
    return data_name(data)


def data_name(data: Any) -> str:
    """What data is called: by the package datasets, or by its class; with the number of samples where that is known."""
    source = getattr(data, "dataset", data)
    info = getattr(source, "info", None)
    for name in (getattr(info, "dataset_name", None), getattr(info, "builder_name", None)):
        if isinstance(name, str) and name and name not in GENERIC:
            split = getattr(source, "split", None)
            called = f"{name}{f' ({split})' if split else ''}"
            break
    else:
        called = type(source).__name__
    try:
        return f"{called}, {len(source):,} samples"
    except TypeError:
        return called


def bullets(facts: Mapping[str, Any]) -> list[str]:
    """A list of facts."""
    return ["\n".join(f"- {name}: {value}" for name, value in facts.items())]


def table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """A table of two columns; "" without rows."""
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for name, value in rows.items():
        text = f"{value:.6g}" if isinstance(value, float) else json.dumps(plain(value), ensure_ascii=False)
        lines.append(f"| {name} | {text.strip(chr(34)).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def yaml_lines(value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A mapping as YAML, a line at a time."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield f"{indent}{key}:"
            yield from yaml_lines(entry, indent + "  ")
        elif isinstance(entry, list):
            yield f"{indent}{key}:"
            for item in entry:
                if isinstance(item, dict):
                    first, *rest = yaml_lines(item, indent + "  ")
                    yield f"{indent}- {first.strip()}"
                    yield from rest
                else:
                    yield f"{indent}- {scalar(item)}"
        else:
            yield f"{indent}{key}: {scalar(entry)}"


def scalar(value: Any) -> str:
    """A number or text as JSON has it, which is YAML, or without its quotes where it needs none."""
    return value if isinstance(value, str) and PLAIN.match(value) else json.dumps(value, ensure_ascii=False)
