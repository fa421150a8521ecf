"""The tree of errors a user can act on; anything else that is raised is a bug and shows its traceback.

QuantpressError            (exit code 1)
├── UsageError             2  a flag, option or pipeline key is wrong
├── InputError             3  a checkpoint, adapter, GGUF, ONNX or text file is wrong
│   ├── LayoutError        3  a format cannot hold what it is asked to hold exactly
│   └── UnknownFamilyError 3  a model of a family without a table here
├── ParityError            4  the output does not speak like the source, or could not be judged
├── OutputError            5  disk full, no permission, a missing runtime
├── BusyError              6  another run holds the output or the cache
├── BatchError             7  some jobs of a batch failed
└── CancelledError       130  the caller asked to stop

A message names the file and the tensor or key, what was found, what was wanted and what to do. It is one line.
"""

from __future__ import annotations

__all__ = [
    "BatchError",
    "BusyError",
    "CancelledError",
    "InputError",
    "LayoutError",
    "OutputError",
    "ParityError",
    "QuantpressError",
    "UnknownFamilyError",
    "UsageError",
]


class QuantpressError(Exception):
    """Base of all errors that name something the user can change."""

    exit_code = 1


class UsageError(QuantpressError):
    """A flag, an option or a pipeline key is wrong."""

    exit_code = 2


class InputError(QuantpressError):
    """An input file is missing, damaged, hostile or of a kind that is not supported."""

    exit_code = 3


class LayoutError(InputError):
    """A target format cannot hold the values exactly."""


class UnknownFamilyError(InputError):
    """A model is of a family that has no table here; what needs none still works."""


class ParityError(QuantpressError):
    """The output differs from its source by more than the limits, or nothing could judge it."""

    exit_code = 4


class OutputError(QuantpressError):
    """The output cannot be written, or a runtime that is needed is not installed."""

    exit_code = 5


class BusyError(QuantpressError):
    """Another run holds the lock of the output or the cache."""

    exit_code = 6


class BatchError(QuantpressError):
    """Some jobs of a batch failed; the others are done."""

    exit_code = 7


class CancelledError(QuantpressError):
    """The caller asked to stop; what was finished is kept for the next run."""

    exit_code = 130
