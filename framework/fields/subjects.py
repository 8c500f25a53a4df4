"""The subjects of the arguments, in the order in which their fields stand: of a list of options, or a file of them."""

import dataclasses

# The title of each subject, and its first field; it goes to where the next one begins.
SUBJECTS: tuple[tuple[str, str], ...] = (
    ("where results go", "output_dir"),
    ("length and batches", "max_steps"),
    ("optimizer and schedule", "learning_rate"),
    ("logs, evaluations and checkpoints", "logging_strategy"),
    ("interruptions", "preemption_signals"),
    ("data and its order", "seed"),
    ("loss, memory and speed", "label_smoothing_factor"),
    ("display", "progress"),
)
OWN = "arguments of your own"  # fields of a class that derives from FitArguments


def by_subject(arguments: type) -> dict[str, list[str]]:
    """Return the fields of FitArguments, or of a class that derives from it, by the titles of their subjects."""
    begins = {first: title for title, first in SUBJECTS}
    known, title = set[str](), OWN
    found: dict[str, list[str]] = {}
    own = [base for base in arguments.__mro__ if base.__name__ == "ArgumentFields"]
    if own:
        known = {each.name for each in dataclasses.fields(own[0])}
    for each in dataclasses.fields(arguments):
        title = begins.get(each.name, title if each.name in known else OWN)
        found.setdefault(title, []).append(each.name)
    return found
