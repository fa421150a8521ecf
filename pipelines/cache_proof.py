"""Whether a model that is fed token by token, with its cache, says what it says of the whole text at once.

Perplexity feeds whole windows, so a file whose cache is wrong would pass it and talk nonsense in use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.onnx.precision import precision_of
from quantpress.pipelines.onnx_runtime import OnnxRuntime
from quantpress.pipelines.parity import Parity
from quantpress.pipelines.token_figures import token_figures
from quantpress.pipelines.verdicts import failed

__all__ = ["cache_problem", "with_cache_proof"]

_STEPS = 8  # tokens that are decoded one by one
_TINY = 1e-30  # logits that are all the same have no spread
# Largest difference of a logit, as a share of the spread of all logits. The two ways differ only by the order of sums:
# 8 times the rounding error of the type were seen (6M parameters, 6 layers), errors of layers add like their root, so
# 126 layers have 40 times: 2.4e-6 in float32, where sums over thousands of columns add to it, and 0.02 in float16.
_SHARES = {"FLOAT": 1e-4, "FLOAT16": 0.02}


def with_cache_proof(parity: Parity, runtime: OnnxRuntime, window: NDArray[np.int32]) -> Parity:
    """Turns a verdict into a failure where the cache changes what the model says."""
    problem = cache_problem(runtime, window, max_kld=parity.limits.max_kld)
    if not problem:
        return parity
    return failed(parity, problem, "cache")


def cache_problem(runtime: OnnxRuntime, window: NDArray[np.int32], *, max_kld: float) -> str:
    """Compares the last tokens of a window, decoded one by one, with a run of the whole window.

    Args:
        runtime: the model; one without a cache has nothing to prove.
        window: (n,) token ids.
        max_kld: mean KL divergence that passes where the model rounds the inputs of matrices: by the range of all
            tokens of a run, or to codes that the last bit of a sum decides, so it differs as its type does.

    Returns:
        What is wrong, "" if nothing is.

    Raises:
        ParityError: onnxruntime fails while it runs.
    """
    steps = min(_STEPS, len(window) - 1)
    if not runtime.has_cache or steps < 1:
        return ""
    begin = len(window) - steps
    whole = runtime.logits(window, begin)
    ids = np.asarray(window, np.int64)
    _, cache = runtime.prefill(ids[None, :begin])
    rows = []
    for position in range(begin, len(window)):
        found, cache = runtime.decode(ids[position : position + 1], cache)
        rows.append(found[0])
    decoded = np.stack(rows)
    told = f"the last {steps} tokens of the first chunk, decoded one by one with the cache,"
    if not np.isfinite(decoded).all():
        return f"{told} give logits that are NaN or infinite"
    precision = precision_of(runtime.model)
    if precision.activations:
        kld = float(token_figures(whole, decoded, window[begin:]).divergence.mean())
        return "" if kld <= max_kld else f"{told} differ from the chunk at once: mean KL divergence {kld:.3g}"
    spread = float(whole.max() - whole.min())
    share = float(np.abs(whole - decoded).max()) / max(spread, _TINY)
    limit = _SHARES.get(precision.compute, _SHARES["FLOAT16"])
    if share <= limit:
        return ""
    return f"{told} differ from the chunk at once: by {share:.2%} of the logits' spread, more than {limit:.2%}"
