"""Press language models into the formats that people run, and prove every file in its real runtime.

    import quantpress as qp

    model = qp.open_checkpoint("./my-model")
    qp.export_gguf(model, "my-model-Q8_0.gguf", outtype="Q8_0")
    report = qp.verify("my-model-Q8_0.gguf", against=model)

    qp.export_onnx(model, "my-model-onnx/", precision="int4", verify=True)

    merged = qp.merge_lora(model, "my-adapter/")
    qp.export_safetensors(merged, "my-merged-model/", verify=True)
    qp.quantize(merged, "my-int4-model/", method="gptq", bits=4, calibration="calib.txt")

    results = qp.run_pipeline("release.yaml")

Names are handed on from where they live when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantpress.convert.checkpoint import Checkpoint, LazyTensor
    from quantpress.convert.lora.adapter import Adapter, open_adapter
    from quantpress.convert.lora.ledger import LedgerEntry
    from quantpress.convert.lora.merge import merge_lora
    from quantpress.convert.open import open_checkpoint
    from quantpress.pipelines.batch.results import BatchResult, JobResult, OutputResult
    from quantpress.pipelines.batch.run import run_pipeline
    from quantpress.pipelines.batch.tasks import Event
    from quantpress.pipelines.inspection import inspect
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.library import export_gguf, export_onnx, export_safetensors, imatrix, quantize
    from quantpress.pipelines.manifest import ManifestFile, ManifestReport, verify_manifest
    from quantpress.pipelines.parity import Parity
    from quantpress.pipelines.parity_limits import Limits
    from quantpress.pipelines.perplexity import Perplexity
    from quantpress.pipelines.report.writing import write_report
    from quantpress.pipelines.runner import Pressed
    from quantpress.pipelines.stage import (
        Artifact,
        BuildingStage,
        OutputFile,
        Plan,
        PlannedTensor,
        Prepared,
        PreparingStage,
        RunContext,
        Stage,
        TensorResult,
    )
    from quantpress.pipelines.verification import perplexity, verify
    from quantpress.quant.errors import (
        BatchError,
        BusyError,
        CancelledError,
        InputError,
        LayoutError,
        OutputError,
        ParityError,
        QuantpressError,
        UnknownFamilyError,
        UsageError,
    )

__all__ = [
    "Adapter",
    "Artifact",
    "BatchError",
    "BatchResult",
    "BuildingStage",
    "BusyError",
    "CancelledError",
    "Checkpoint",
    "Event",
    "InputError",
    "JobResult",
    "JudgeOptions",
    "LayoutError",
    "LazyTensor",
    "LedgerEntry",
    "Limits",
    "ManifestFile",
    "ManifestReport",
    "OutputError",
    "OutputFile",
    "OutputResult",
    "Parity",
    "ParityError",
    "Perplexity",
    "Plan",
    "PlannedTensor",
    "Prepared",
    "PreparingStage",
    "Pressed",
    "QuantpressError",
    "RunContext",
    "Stage",
    "TensorResult",
    "UnknownFamilyError",
    "UsageError",
    "export_gguf",
    "export_onnx",
    "export_safetensors",
    "imatrix",
    "inspect",
    "merge_lora",
    "open_adapter",
    "open_checkpoint",
    "perplexity",
    "quantize",
    "run_pipeline",
    "verify",
    "verify_manifest",
    "write_report",
]

_HOMES = {
    "Adapter": "convert.lora.adapter",
    "Artifact": "pipelines.stage",
    "BatchResult": "pipelines.batch.results",
    "BuildingStage": "pipelines.stage",
    "Checkpoint": "convert.checkpoint",
    "Event": "pipelines.batch.tasks",
    "JobResult": "pipelines.batch.results",
    "JudgeOptions": "pipelines.judging",
    "LazyTensor": "convert.checkpoint",
    "LedgerEntry": "convert.lora.ledger",
    "Limits": "pipelines.parity_limits",
    "ManifestFile": "pipelines.manifest",
    "ManifestReport": "pipelines.manifest",
    "OutputFile": "pipelines.stage",
    "OutputResult": "pipelines.batch.results",
    "Parity": "pipelines.parity",
    "Perplexity": "pipelines.perplexity",
    "Plan": "pipelines.stage",
    "PlannedTensor": "pipelines.stage",
    "Prepared": "pipelines.stage",
    "PreparingStage": "pipelines.stage",
    "Pressed": "pipelines.runner",
    "RunContext": "pipelines.stage",
    "Stage": "pipelines.stage",
    "TensorResult": "pipelines.stage",
    "export_gguf": "pipelines.library",
    "export_onnx": "pipelines.library",
    "export_safetensors": "pipelines.library",
    "imatrix": "pipelines.library",
    "inspect": "pipelines.inspection",
    "merge_lora": "convert.lora.merge",
    "open_adapter": "convert.lora.adapter",
    "open_checkpoint": "convert.open",
    "perplexity": "pipelines.verification",
    "quantize": "pipelines.library",
    "run_pipeline": "pipelines.batch.run",
    "verify": "pipelines.verification",
    "verify_manifest": "pipelines.manifest",
    "write_report": "pipelines.report.writing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quantpress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantpress.{_HOMES.get(name, 'quant.errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
