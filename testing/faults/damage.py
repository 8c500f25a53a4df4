"""Damage to what lies on a disk."""

from pathlib import Path


def flip_bit(path: str | Path, file: str = "model/*.safetensors", offset: int | None = None, bit: int = 0) -> Path:
    """Flip one bit of a checkpoint, in place, as a failing disk or a broken transfer does.

    Args:
        path: a checkpoint, or a file.
        file: a pattern of files in the checkpoint, of which the largest is damaged.
        offset: the byte; None takes the one in the middle.
        bit: of the byte, from 0 to 7.

    Returns:
        The damaged file.

    Raises:
        FileNotFoundError: the checkpoint has no such file, or the file no such byte.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("some.bin").write_bytes(bytes(3))
        >>> flip_bit("some.bin", bit=7).read_bytes()
        b'\\x00\\x80\\x00'
    """
    path = Path(path)
    found = [path] if path.is_file() else sorted(path.glob(file), key=lambda each: each.stat().st_size)
    if not found:
        raise FileNotFoundError(f"{path} has no file {file}")
    damaged = found[-1]
    size = damaged.stat().st_size
    place = size // 2 if offset is None else offset
    if not 0 <= place < size:
        raise FileNotFoundError(f"{damaged} has no byte {place}: it is {size} bytes long")
    with damaged.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << bit)]))
    return damaged
