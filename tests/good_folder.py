"""A small good folder to spoil, and the way every refusal of it must look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError

VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def good_folder(folder: Path) -> Path:
    """Makes a folder with one file of weights."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    save_file(VALUES, folder / "model.safetensors")
    return folder


def refused(folder: Path, words: str) -> str:
    """Gives the message, which is one short line that begins with the folder."""
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    assert len(message) < 600
    assert caught.value.exit_code == 3
    return message
