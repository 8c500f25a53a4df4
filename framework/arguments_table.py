"""The page of docs/ with all arguments: ``python -m stratagem.framework.arguments_table`` prints it."""

import dataclasses
import re
from collections.abc import Iterable

from .arguments import FitArguments
from .fields.argument_types import descriptions
from .fields.foreign_arguments import DIFFERENT, FOREIGN


def arguments_table() -> str:
    """Return a Markdown page with every field, its default and what it does."""
    said = descriptions(FitArguments)
    rows = []
    for field in dataclasses.fields(FitArguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        what = linked(said[field.name].replace("|", "\\|").replace("``", "`"))
        rows.append(f"| `{field.name}` | `{default!r}` | {what} |")
    head = [
        "# Arguments",
        "",
        "```python",
        "from stratagem import Fit, FitArguments",
        "```",
        "",
        "Every field of `FitArguments`; each is also a keyword argument of `Fit`. Made from its docstring by",
        "`python -m stratagem.framework.arguments_table > docs/arguments.md`.",
        "",
        "| argument | default | what it does |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n"


def training_arguments_table(names: Iterable[str]) -> str:
    """Return a Markdown table of the arguments of transformers, in the order of their names.

    Args:
        names: the names of the fields of TrainingArguments.
    """
    ours = {field.name for field in dataclasses.fields(FitArguments)}
    rows = []
    for name in sorted(names):
        same = f"the same: {DIFFERENT[name]}" if name in DIFFERENT else "the same"
        rows.append(f"| `{name}` | {same if name in ours else f'refused. {FOREIGN[name]}'} |")
    return linked("\n".join(["| TrainingArguments | FitArguments |", "| --- | --- |", *rows]) + "\n")


def linked(text: str) -> str:
    """Have the names of pages in a text be links between pages."""
    return re.sub(r"\bdocs/(\w+)\.md", lambda page: f"[{page[1].replace('_', ' ')}]({page[0][5:]})", text)


if __name__ == "__main__":
    print(arguments_table(), end="")
