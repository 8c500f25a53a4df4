"""A language model that writes dates in English learns to write them in French, by adapters (LoRA; Hu et al., 2021).

    python examples/lora.py                   # needs peft; takes seconds
    python examples/lora.py --strategy fsdp2 --devices 2 --per_device_train_batch_size 32
    python examples/lora.py --build.rank 2    # smaller adapters
    python examples/lora.py --help            # every option of the run

A tiny Llama learns English dates first, as there is nothing to download; then its weights stay as they are. It ends
with a table: what was trained, what a checkpoint of it takes, and how dates are written of days that it never saw.
"""

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from stratagem import Fit, TrainModule, configure
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MONTHS = {
    "English": "January,February,March,April,May,June,July,August,September,October,November,December",
    "French": "janvier,février,mars,avril,mai,juin,juillet,août,septembre,octobre,novembre,décembre",
}
LETTERS = "\n" + "".join(sorted(set("0123456789-= " + "".join(MONTHS.values()))))
"""A token is a letter; the first ends a line, and fills it up."""
ASKED = len("2026-11-29=")


def written(day: date, language: str) -> str:
    """What the model learns to continue, and its continuation."""
    month = MONTHS[language].split(",")[day.month - 1]
    return f"{day}=" + (f"{month} {day.day}, {day.year}" if language == "English" else f"{day.day} {month} {day.year}")


def data(language: str = "French", days: int = 6000) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dates of days in a hundred years, drawn at random: to learn from, and 200 others. What is asked has no labels.

    Args:
        language: "English" or "French".
        days: to learn from.
    """
    drawn = torch.randperm(36500, generator=torch.Generator().manual_seed(0))[: days + 200].tolist()
    lines = [written(date(1950, 1, 1) + timedelta(day), language) for day in drawn]
    ids = torch.tensor([[LETTERS.index(letter) for letter in line.ljust(32, "\n")] for line in lines])
    counts = torch.tensor([[ASKED <= i <= len(line) for i in range(32)] for line in lines])
    labels = torch.where(counts, ids, -100)
    return {"input_ids": ids[200:], "labels": labels[200:]}, {"input_ids": ids[:200], "labels": labels[:200]}


def build(base: str = "", rank: int = 8) -> dict[str, Any]:
    """The model, and what an evaluation says beside the loss.

    Args:
        base: directory of a model, to which adapters are added; without one, a tiny model, all of which is trained.
        rank: of the adapters' matrices.
    """
    model: Any
    if base:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    else:
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS), num_attention_heads=4, **sizes, eos_token_id=0))
    return {"module": TrainModule.wrap(model), "compute_metrics": right}


def right(predictions: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """The share of dates without a wrong letter."""
    is_right = (predictions["logits"][:, :-1].argmax(dim=2) == labels[:, 1:]) | (labels[:, 1:] == -100)
    return {"right": is_right.all(dim=1).double().mean().item()}


def row(fit: Fit) -> list[str]:
    """What a run trained, what its last checkpoint takes on the disk, and its evaluations; all ranks call it."""
    trained = sum(parameter.numel() for parameter in fit.module.parameters() if parameter.requires_grad)
    files = Path(fit.args.output_dir, f"checkpoint-{fit.state.global_step}").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    found = [fit.evaluate(data(language)[1]) for language in MONTHS]
    return [f"{trained:,}", f"{size:,}", *(f"{each['eval_loss']:.3f}, {each['eval_right']:.2f}" for each in found)]


ARGUMENTS = {
    "output_dir": "output/lora", "max_steps": 300, "per_device_train_batch_size": 64, "learning_rate": 5e-3,
    "warmup_steps": 0.1, "per_device_eval_batch_size": 200, "logging_steps": 50, "save_steps": 100,
    "save_total_limit": 1,
}  # fmt: skip


def main() -> None:
    """Train a model, adapt it, and compare."""
    run = configure(build, data, ARGUMENTS)
    base, adapters = (Path(run.values["output_dir"], name) for name in ("base/model", "adapters"))
    whole = Fit.from_config(run.with_values({"data.language": "English"}), output_dir=str(base.parent))
    whole.train()
    rows = {"all, on English": row(whole)}
    whole.save_pretrained(base)
    faster = {"build.base": str(base), "learning_rate": 2 * run.values["learning_rate"]}  # so few numbers can take it
    fit = Fit.from_config(run.with_values(faster), save_only_trainable=True)
    fit.train(resume_from_checkpoint=run.resume)
    rows["adapters, on French"] = row(fit)
    fit.save_pretrained(adapters)
    if fit.strategy.is_main:
        table = Table("trained", "parameters", "bytes", "English: loss, right", "French: loss, right")
        for name, cells in rows.items():
            table.add_row(name, *cells)
        Console(width=110).print(table)
        model, asked = AutoModelForCausalLM.from_pretrained(base), data()[1]["input_ids"][:1, :ASKED]
        for with_adapters in (False, True):  # as any program reads them
            reader: Any = PeftModel.from_pretrained(model, adapters) if with_adapters else model
            answer = reader.generate(input_ids=asked, max_new_tokens=20, do_sample=False)[0]
            print("".join(LETTERS[token] for token in answer).strip())


if __name__ == "__main__":
    main()
