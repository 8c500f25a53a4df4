"""A text classifier of transformers that reads a docstring of Python's standard library and says what it is about.

    python examples/classify_text.py                                # needs transformers; takes seconds
    python examples/classify_text.py --strategy fsdp2 --devices 2 --per_device_train_batch_size 16    # the same loss
    python examples/classify_text.py --build.pretrained path/of/a/model    # fine-tunes a model of yours
    python examples/classify_text.py --help                         # every option of the run

It ends with a table of held-out texts. Without --build.pretrained the model begins with random weights.
"""

import ast
import sysconfig
import textwrap
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from rich import print as show
from rich.table import Table
from stratagem import Fit, TrainModule, configure
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, DataCollatorWithPadding, ModernBertConfig, PreTrainedTokenizerFast

TOPICS = {
    "events": ["asyncio"],
    "imports": ["importlib", "pkgutil", "zipimport"],
    "mail": ["email", "imaplib", "mailbox", "poplib", "smtplib"],
    "numbers": ["_pydecimal", "datetime", "fractions", "numbers", "statistics"],
    "tests": ["doctest", "unittest"],
    "web": ["http", "urllib", "wsgiref"],
}
"""What a text may be about, and the modules whose docstrings are."""


@cache
def docstrings() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Texts with the number of their topic: to learn from, and one in five, by a checksum, held out."""
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for topic, modules in enumerate(TOPICS.values()):
        for module in modules:
            for path in sorted([*root.glob(f"{module}.py"), *root.glob(f"{module}/**/*.py")]):
                for node in ast.walk(ast.parse(path.read_bytes())):
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                        found[" ".join((ast.get_docstring(node) or "").split())] = topic
    pairs = [(text, topic) for text, topic in found.items() if len(text) >= 20]
    held_out = [pair for pair in pairs if zlib.crc32(pair[0].encode()) % 5 == 0]
    return sorted(set(pairs) - set(held_out)), held_out


@cache
def tokenizer_of(pretrained: str) -> Any:
    """That of the model to be fine-tuned; without one, pieces of words that are learnt from the training texts."""
    if pretrained:
        return AutoTokenizer.from_pretrained(pretrained)
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator([text for text, _ in docstrings()[0]], vocab_size=2000, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def build(pretrained: str = "", width: int = 64, layers: int = 2) -> dict[str, Any]:
    """The model, what makes its batches, and what an evaluation says beside the loss.

    Args:
        pretrained: directory of a model to fine-tune; without one a tiny model begins with random weights.
        width, layers: of the tiny model.
    """
    tokenizer = tokenizer_of(pretrained)
    if pretrained:
        model = Classifier.from_pretrained(pretrained, num_labels=len(TOPICS))
    else:
        config = ModernBertConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, id2label=dict(enumerate(TOPICS)), classifier_pooling="mean", embedding_dropout=0.3,
            classifier_dropout=0.3, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
        )  # fmt: skip
        model = Classifier.from_config(config)
    collator = DataCollatorWithPadding(tokenizer)
    return {"module": TrainModule.wrap(model), "data_collator": collator, "compute_metrics": accuracy}


def accuracy(predictions: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    return {"accuracy": (predictions["logits"].argmax(dim=1) == labels).double().mean().item()}


def data(pretrained: str = "") -> tuple[list[dict[str, Any]], ...]:
    """Training and held-out texts in tokens, each as long as it is, up to 32."""
    read = tokenizer_of(pretrained)
    made = [[{**read(text, truncation=True, max_length=32), "labels": y} for text, y in part] for part in docstrings()]
    return tuple(made)


ARGUMENTS = {
    "output_dir": "output/classify_text", "num_train_epochs": 4, "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128, "learning_rate": 3e-3, "warmup_steps": 0.1, "logging_strategy": "epoch",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1,
}  # fmt: skip


def main() -> None:
    """Train, and show what is made of texts that were held out."""
    run = configure(build, data, ARGUMENTS)
    fit, names = Fit.from_config(run), list(TOPICS)
    fit.train(resume_from_checkpoint=run.resume)
    found = fit.predict(fit.eval_data)
    if fit.strategy.is_main:
        table = Table("held-out text", "is about", "is taken for", "chance")
        answers = list(zip(docstrings()[1], found.predictions["logits"].softmax(dim=1), strict=True))
        for (text, topic), chances in answers[:: len(answers) // 14]:
            short = textwrap.shorten(text, 38, placeholder=" ...")
            table.add_row(short, names[topic], names[chances.argmax()], f"{chances.max():.2f}")
        show(table)
        print(f"held-out accuracy: {found.metrics['test_accuracy']:.4f} of {len(answers)} texts")


if __name__ == "__main__":
    main()
