"""The table of all arguments, for the documents: ``python -m stratagem.framework.arguments_table``."""

import dataclasses
import inspect
import re

from .arguments import FitArguments


def descriptions() -> dict[str, str]:
    """What FitArguments' docstring says of each field."""
    text = inspect.cleandoc(FitArguments.__doc__ or "").split("Args:\n")[1].split("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if begins := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = begins.group(1).split(", ")
            found.update(dict.fromkeys(names, begins.group(2)))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def arguments_table() -> str:
    """A Markdown page: every field with its default and what it does."""
    said = descriptions()
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
