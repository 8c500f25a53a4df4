"""The check of an output_dir before anything is made in it."""

from pathlib import Path


def check_output_dir(output_dir: str) -> None:
    """Refuse an ``output_dir`` that is a file, or lies below one.

    Raises:
        ValueError: names the file.
    """
    path = Path(output_dir)
    taken = next((each for each in (path, *path.parents) if each.is_file()), None)
    if taken is not None:
        raise ValueError(f"output_dir={output_dir!r} can't be a directory: {str(taken)!r} is a file.")
