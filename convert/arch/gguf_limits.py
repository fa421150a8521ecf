"""What the graphs of several of llama.cpp's architectures lack, and what is said where config.json asks for it."""

from __future__ import annotations

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.quant.errors import InputError

__all__ = ["refuse_bias", "refuse_untied", "require_activation", "require_plain_heads"]


def require_activation(hyper: Hyperparameters, wanted: str, family: str) -> None:
    """Refuses an activation that llama.cpp's graph does not have.

    Raises:
        InputError: naming the activation.
    """
    if hyper.activation != wanted:
        raise InputError(
            f"config.json: the activation is {hyper.activation!r}; llama.cpp computes {wanted!r} for {family}, "
            "so a GGUF file would be another model"
        )


def require_plain_heads(hyper: Hyperparameters, family: str) -> None:
    """Refuses heads whose values are more or fewer than the hidden ones: llama.cpp has one size for both here.

    Raises:
        InputError: naming `head_dim`.
    """
    if hyper.heads * hyper.head_dim != hyper.hidden:
        raise InputError(
            f"config.json: 'head_dim' is {hyper.head_dim}; llama.cpp wants {hyper.hidden // hyper.heads} for {family}, "
            "the hidden size divided by the heads"
        )


def refuse_bias(hyper: Hyperparameters, family: str, *flags: str) -> None:
    """Refuses biases that llama.cpp's graph does not add.

    Args:
        hyper: what config.json says.
        family: for the message.
        flags: keys of config.json that switch them on, as they are in `Hyperparameters.flags`.

    Raises:
        InputError: naming the key.
    """
    for flag in flags:
        if flag in hyper.flags:
            raise InputError(f"config.json: {flag!r} is true; llama.cpp has no such biases for {family}")


def refuse_untied(hyper: Hyperparameters, family: str) -> None:
    """Refuses a head of its own where llama.cpp always takes the embedding.

    Raises:
        InputError: naming `tie_word_embeddings`.
    """
    if not hyper.tied:
        raise InputError(f"config.json: 'tie_word_embeddings' is false; llama.cpp has no separate head for {family}")
