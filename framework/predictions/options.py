"""Where predictions go, and how many rows are held at once."""

from dataclasses import dataclass
from pathlib import Path

PARQUET = ".parquet"


@dataclass(frozen=True)
class PredictionWriter:
    """Says where ``fit.predict(data, output=...)`` writes, and how much of it a rank holds meanwhile.

    Args:
        path: of one Parquet file, where it ends in ".parquet" (the extra ``parquet``); else of a directory of
            safetensors files, which ``read_predictions`` reads.
        rows: that a rank holds before they are written: a row group of the Parquet file, or a file of the directory. A
            batch more may be held.
        max_bytes: that those rows may take; with larger ones fewer are held.

    Raises:
        ValueError: the path has another ending, or a number is out of its range.

    Example:
        ``fit.predict(data, output=PredictionWriter("predictions.parquet", rows=500))``
    """

    path: str | Path
    rows: int = 4096
    max_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        for name in ("rows", "max_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"PredictionWriter({name}={value!r}): must be at least 1.")
        suffix = self.place.suffix
        if suffix and suffix != PARQUET and not self.place.is_dir():
            raise ValueError(
                f"output={str(self.path)!r}: predictions are written as one file that ends in '.parquet', or into a "
                f"directory of safetensors files, whose name has no ending like {suffix!r}."
            )

    @property
    def place(self) -> Path:
        """The path, with "~" for your home."""
        return Path(self.path).expanduser()

    @property
    def is_parquet(self) -> bool:
        """Whether one Parquet file is written."""
        return self.place.suffix == PARQUET


def writer_of(output: "str | Path | PredictionWriter") -> PredictionWriter:
    """Return the writer that was given, or one for a path.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(output, PredictionWriter):
        return output
    if not isinstance(output, str | Path):
        raise TypeError(
            f"output takes a path ('predictions.parquet', or a directory), or a PredictionWriter. Received: {output!r}"
        )
    return PredictionWriter(output)
