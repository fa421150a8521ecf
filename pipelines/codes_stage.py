"""Stages that turn a model's linear weights into codes, for the outputs that follow: rtn, hqq, gptq, awq, smoothquant.

RTN and HQQ look at the weights alone, so their codes are found whenever an output reads them. The others run the model
on a text, which takes long: their codes are kept in a folder, and every output that follows is written from there.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quantpress.convert.atomic import require_space
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.disk import remove
from quantpress.convert.kept_codes import kept
from quantpress.convert.packed_parts import plain_dtype
from quantpress.convert.preflight import Preflight, check_tied_head
from quantpress.convert.quantized import CodesOrigin
from quantpress.pipelines.codes_view import Codes, found_when_read, unread, view_with
from quantpress.pipelines.lazy_prepared import LazyPreparedStage
from quantpress.pipelines.merge_stage import ledger_of
from quantpress.pipelines.quantize_codes import WeightsJob, hashed
from quantpress.pipelines.quantize_work import LIVE, reports_of
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import Prepared, PreparingStage, RunContext, Stage
from quantpress.quant.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from quantpress.convert.checkpoint import LazyTensor
    from quantpress.convert.quantized import LazyQuantized
    from quantpress.pipelines.quantize_plan import PlannedWeight

__all__ = ["Awq", "CalibratedStage", "CodesStage", "Gptq", "Hqq", "LazyCodesStage", "Rtn", "SmoothQuant"]

log = logging.getLogger(__name__)

_FOLDER = "codes"  # of the spool, in the folder that the work is given
_FINISHED = "finished"  # the spool's last step
_FOLDING = ("awq", "smoothquant")  # they scale columns, and fold the inverse into what stands before


@dataclass(frozen=True, kw_only=True)
class CodesStage(Stage):
    """Options of every stage that finds codes; None where it depends on others, as `quantize` has them.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; -1 for a whole row.
        symmetric: no zeros are stored.
        scale_type: "F16", which every format that follows holds bit for bit, "BF16" or "F32". F16 has no scale for
            4-bit weights beyond 524,032, and only coarse ones for groups of weights that are all below 1e-4.
        clip_search: choose ranges by squared error.
        activation_bits: 8 to have inputs rounded too.
        skip: regular expressions of weights that stay as they are.
        override: `REGEX=key:value,...`; the first that is found wins.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_type: str = "F16"
    clip_search: bool | None = None
    activation_bits: int | None = None
    skip: tuple[str, ...] = ()
    override: tuple[str, ...] = ()

    def filled(self, source: Checkpoint) -> dict[str, Any]:
        """Gives every option with what depends on the source filled in.

        Raises:
            UsageError: options that do not go together, or a model that is quantized already, or measured already where
                the method scales columns.
            UnknownFamilyError: a method that runs the model, and there is no table for it.
        """
        made = self._asked().resolved(source)
        if source.importance is not None and self.name in _FOLDING:
            raise UsageError(
                f"stage imatrix before {self.name}: {self.name} scales columns, and what was measured is no longer"
                f" theirs; put imatrix after {self.name}"
            )
        return {field.name: getattr(made, field.name) for field in fields(self)}

    def _asked(self) -> Codes:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return Codes(output=Path(_FOLDER), method=self.name, **options)

    def _job(self, source: Checkpoint) -> WeightsJob:
        return WeightsJob(self._asked().resolved(source), source)


@dataclass(frozen=True, kw_only=True)
class LazyCodesStage(CodesStage, LazyPreparedStage):
    """Options of a stage whose codes are found when they are read."""

    def resolved(self, source: Checkpoint) -> LazyCodesStage:
        """Gives the stage with every default filled in that depends on the source."""
        return dataclasses.replace(self, **self.filled(source))

    def prepared(self, source: Checkpoint, context: RunContext) -> Prepared:
        """Gives the model with codes as its weights; reads headers only.

        Returns:
            Its `reports` grow as codes are read.

        Raises:
            UsageError: options that do not go together, or a model that is quantized already.
            InputError: there is nothing to quantize.
        """
        job, reports = self._job(source), dict[str, Any]()
        codes = partial(found_when_read, job, threads=context.threads, reports=reports)
        view = _view(job, {}, codes, _key(job, context))
        return Prepared(view, job.notes, reports=reports, judged_as=job.judged_as)


@dataclass(frozen=True, kw_only=True)
class Rtn(LazyCodesStage):
    """Rounds weights to the nearest codes; options as `CodesStage`."""

    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class Hqq(LazyCodesStage):
    """Chooses zeros by half-quadratic optimization; options as `CodesStage`."""

    name: ClassVar[str] = "hqq"
    version: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class CalibratedStage(CodesStage, PreparingStage):
    """Options of a stage that runs the model on a text, besides those of `CodesStage`.

    Attributes:
        calibration: UTF-8 text; None for the built-in one.
        samples: number of windows of that text.
        sequence_length: tokens of a window; None for what the model was made for, up to 2048.
        seed: chooses their places.
        calibration_dtype: "f32" or "bf16", how products of the calibration are computed; None: bf16 where the
            processor has units for it.
    """

    calibration: Path | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    calibration_dtype: str | None = None

    def resolved(self, source: Checkpoint) -> CalibratedStage:
        """Gives the stage with every default filled in that depends on the source."""
        return dataclasses.replace(self, **self.filled(source))

    def needs(self, source: Checkpoint) -> tuple[int, int, int]:
        """Estimates bytes of memory, of temporary files, and of what is kept at the end."""
        job = self._job(source)
        return (*job.needs(), job.packed_bytes)

    def planned(self, source: Checkpoint) -> Prepared:
        """Gives the model as it will be, for planning; codes cannot be read from it."""
        job = self._job(source)
        return Prepared(_view(job, {}, unread, _FINISHED), job.notes, judged_as=job.judged_as)

    def prepare(self, source: Checkpoint, folder: Path, context: RunContext) -> None:
        """Finds the codes, layer by layer, and keeps them in a folder, going on from what is finished there.

        Raises:
            InputError: the text cannot be used, or values are not finite.
            LayoutError: a scale that `scale_type` cannot hold.
            OutputError: the disk has no room.
        """
        job, place = self._job(source), folder / _FOLDER
        if isinstance(job.checked, Preflight):
            check_tied_head(job.checked)
        calibration = job.calibration()
        notes = (calibration.note,) if calibration is not None and calibration.note else ()
        for note in (*job.notes, *notes):
            log.warning("%s", note)
        require_space(folder, job.needs()[1] + job.packed_bytes)
        spool = Spool(place, _key(job, context))
        if _FINISHED not in spool.steps:
            job.quantize(spool, context, calibration)
            record: dict[str, Any] = {"notes": list(notes), "ledger": [entry.to_json() for entry in ledger_of(source)]}
            record["calibration"] = {} if calibration is None else calibration.record()
            spool.add(_FINISHED, {}, record)
        remove(place / LIVE)

    def opened(self, source: Checkpoint, folder: Path) -> Prepared:
        """Gives the model from a folder where the work is finished.

        Raises:
            InputError: it is not finished there, or damaged.
        """
        from quantpress.convert.lora.ledger import LedgerEntry

        job, found = self._job(source), Spool.read_only(folder / _FOLDER)
        if _FINISHED not in found.steps:
            raise InputError(f"{folder}: the codes of {self.name} are not finished")
        said = found.steps[_FINISHED]
        codes = partial(_kept, parts=found.tensors)
        view = _view(job, found.tensors, codes, found.key)
        return Prepared(
            view,
            (*job.notes, *said["notes"]),
            said["calibration"],
            reports_of(found.steps),
            job.judged_as,
            tuple(LedgerEntry.from_json(entry) for entry in said["ledger"]),
        )


@dataclass(frozen=True, kw_only=True)
class Gptq(CalibratedStage):
    """GPTQ: rounds a column at a time and makes up for its error in those to come; further options of its own.

    Attributes:
        act_order: take the columns with the greatest inputs first.
        damping: share of the mean of the Hessian's diagonal that is added to it.
        drift: share of the inputs' drift that weights make up for, 0 takes half the time; None: all of it where that
            is a matter of seconds, as it is for small models, else nothing; nothing at 8 bits.
    """

    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 1

    act_order: bool = True
    damping: float = 0.01
    drift: float | None = None


@dataclass(frozen=True, kw_only=True)
class Awq(CalibratedStage):
    """AWQ: scales the columns with great inputs up before rounding; options as `CalibratedStage`."""

    name: ClassVar[str] = "awq"
    version: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(CalibratedStage):
    """SmoothQuant: moves the range of inputs into weights, both of 8 bits; options as `CalibratedStage`."""

    name: ClassVar[str] = "smoothquant"
    version: ClassVar[int] = 1


def _key(job: WeightsJob, context: RunContext) -> str:
    """Tells codes apart; what the files hold is known to who gives the folder."""
    inputs = [[file.path.name, file.nbytes] for file in job.source.files]
    return hashed({**job.described(context), "inputs": inputs})


def _kept(weight: PlannedWeight, *, parts: Mapping[str, LazyTensor]) -> LazyQuantized:
    return kept(weight.name, weight.form, parts)


def _view(
    job: WeightsJob, parts: Mapping[str, LazyTensor], codes: Callable[[PlannedWeight], LazyQuantized], key: str
) -> Checkpoint:
    """The model with its codes; adapters are in them, so that nothing is to be merged or quantized anew."""
    view = view_with(job, parts, codes, dtype=plain_dtype(job.source.config))
    return dataclasses.replace(view, adapted=None, codes_origin=CodesOrigin(key, job.details))
