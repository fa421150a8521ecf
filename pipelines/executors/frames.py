"""Messages between the process that runs a batch and its workers: length, then a pickle.

Only processes that this one has started write here, so that a pickle is as safe as the program itself.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

__all__ = ["READY", "decode", "encode", "read_frame", "skip_to_ready", "write_frame"]

READY = b"\nquantpress worker is ready\n"
"""What a worker writes first; what came before was printed while Python started, and is no frame."""

_LENGTH = struct.Struct("<Q")


def encode(value: Any) -> bytes:
    """Pickles a value.

    Raises:
        ValueError: it cannot be pickled; says why.
    """
    try:
        return pickle.dumps(value, protocol=4)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def decode(frame: bytes) -> Any:
    """Gives the value of a frame that this program wrote."""
    return pickle.loads(frame)  # noqa: S301 - written by a process that this one started, or that started this one


def write_frame(stream: BinaryIO, frame: bytes) -> None:
    """Writes one message.

    Raises:
        OSError: nobody reads any more.
    """
    stream.write(_LENGTH.pack(len(frame)) + frame)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """Reads one message; None at the end of the stream, also where it ends within a message."""
    prefix = stream.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(prefix)
    frame = stream.read(length)
    return frame if len(frame) == length else None


def skip_to_ready(stream: BinaryIO) -> bool:
    """Reads up to the end of `READY`; False where the stream ends before."""
    seen = b""
    while not seen.endswith(READY):
        byte = stream.read(1)
        if not byte:
            return False
        seen = (seen + byte)[-len(READY) :]
    return True
