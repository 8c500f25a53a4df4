"""The table of all arguments, for the documents: ``python -m stratagem.framework.arguments_table``."""

import dataclasses

from .argument_types import descriptions
from .arguments import FitArguments


def arguments_table() -> str:
    """A Markdown page: every field with its default and what it does."""
    said = descriptions(FitArguments)
    rows = []
    for field in dataclasses.fields(FitArguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        what = said[field.name].replace("|", "\\|").replace("``", "`")
        rows.append(f"| `{field.name}` | `{default!r}` | {what} |")
    head = [
        "# Arguments",
        "",
        "Every field of `FitArguments`; each is also a keyword argument of `Fit`. Made from its docstring by",
        "`python -m stratagem.framework.arguments_table > docs/arguments.md`.",
        "",
        "| argument | default | what it does |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    print(arguments_table(), end="")
