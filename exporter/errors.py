"""One error class a stage. Only ``exporter.cli`` turns them into exit codes."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence

from graph_passes.errors import DepthcutError as DepthcutError
from graph_passes.errors import InterruptedResultError as InterruptedResultError
from graph_passes.errors import OnnxFileError as OnnxFileError
from graph_passes.errors import PreparedFolderError as PreparedFolderError
from graph_passes.errors import SurgeryError as SurgeryError
from graph_passes.errors import TargetInUseError as TargetInUseError
from graph_passes.errors import UnsafeInputError as UnsafeInputError
from graph_passes.errors import UnsafeOnnxFileError as UnsafeOnnxFileError
from graph_passes.errors import UsageError as UsageError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The ``errno`` of an ``OSError`` where there is no room, a quota, or a limit on files."""

OUT_OF_MEMORY = "out-of-memory"
"""The code of an error where a device has too little memory left."""


_NO_NAMES: Mapping[str, str] = {}


class OptionError(UsageError):
    """Options are of the wrong type, out of bounds, or don't go together.

    Attributes:
        names: The fields of the options' classes, and what files call them. ``{0}`` in the texts
            it was made of is the first of them.
    """

    def __init__(
        self, message: str, hint: str = "", names: Mapping[str, str] = _NO_NAMES, *, code: str = ""
    ) -> None:
        super().__init__(message, hint, code=code)
        self._texts, self.names = (message, hint), names
        self.say(list(names))

    @property
    def keys(self) -> tuple[str, ...]:
        """What files call them."""
        return tuple(self.names.values())

    def say(self, words: Sequence[str]) -> None:
        """Calls the options so."""
        if words:
            self.message, self.hint = (text.format(*words) for text in self._texts)


class SweepError(UsageError):
    """A sweep's file is not valid, names what isn't there, or its folder is another's."""


class MissingDependencyError(DepthcutError):
    """An optional library is not installed. The hint names the extra that brings it."""


class ArtifactError(DepthcutError):
    """A stage's file is missing, of a newer schema, or not valid."""


class ModelSourceError(DepthcutError):
    """A model can't be loaded from where it is said to be."""


class UnknownArchitectureError(ModelSourceError):
    """The model loads, but where its attention and MLP modules are is not known."""


class UnsafeModelError(UnsafeInputError, ModelSourceError):
    """What a model's folder says would run code, use the network or read elsewhere."""


class TextSourceError(DepthcutError):
    """A text for calibration or evaluation can't be read."""


class TaskError(DepthcutError):
    """A task with right answers is not known, or its items can't be read."""


class CalibrationError(DepthcutError):
    """The calibration text does not give enough tokens."""


class ScoringError(DepthcutError):
    """Importance can't be computed: NaN activations, no tokens."""


class PlanError(DepthcutError):
    """A plan names sublayers that don't exist, or drops more than may be dropped."""


class UnmetGoalError(PlanError):
    """No plan keeps what was asked for: the answer is no, and says what is in reach."""


class UndecidedGoalError(UnmetGoalError):
    """No plan was shown to keep what was asked for, nor that none does."""


class UnsafePlanError(UnsafeInputError, PlanError):
    """A plan names a file outside of its folder."""


class HealingError(DepthcutError):
    """A replacement can't be fitted: too few tokens, activations that are not finite."""


class ExportError(DepthcutError):
    """PyTorch's exporter failed, or its graph does not compute what PyTorch computes."""


class GgufFileError(DepthcutError):
    """A GGUF file, or one of its shards, is missing, cut short, or says what can't be."""


class VerificationError(SurgeryError):
    """The pruned graph does not compute what the masked original computes."""


class TooLittleMemoryError(VerificationError):
    """A result can't be verified on this machine; whether it is right is not known."""


class QuantizationError(DepthcutError):
    """A graph's weights can't be quantised as asked, or the result computes nonsense."""


class BackendError(DepthcutError):
    """An execution backend can't load or run the model as asked."""


class EngineError(DepthcutError):
    """An engine can't be built, or is not for this machine, or not what its sidecar says."""


class PackagingError(DepthcutError):
    """A model can't be packed for where it is to be served."""


class ComparisonError(DepthcutError):
    """Two arms can't be compared: other inputs, vocabularies or texts."""


class DisturbedMachineError(ComparisonError):
    """A quota or other virtual machines take so much CPU time that times tell nothing."""


class CostError(DepthcutError):
    """What sublayers cost can't be measured, or was measured of another graph or elsewhere."""


class ClusterError(DepthcutError):
    """A cluster can't be reached, its workers don't fit, or it lost a piece of work for good."""


class RegressionError(DepthcutError):
    """A report can't be held against its limits or its baseline. No verdict: nothing was found."""


def first_line(error: BaseException) -> str:
    """What another library's error says first, without its full stop; else its class's name."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(" .:")


def plain_words(error: BaseException) -> str:
    """What is said of any error, without its hint."""
    if isinstance(error, DepthcutError):
        return error.message
    if isinstance(error, MemoryError):
        return "Out of memory."
    if not isinstance(error, OSError):
        name = type(error).__name__
        return f"Unexpected {name}: {first_line(error)} (-v shows the traceback)"
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in FULL_DISK:
        return f"The disk is full{where}. Free some space and run the command again."
    return f"{error.strerror or error}{where}."


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or beside, back to the first."""
    exception: BaseException | None = error
    while exception is not None:
        yield exception
        exception = exception.__cause__ or exception.__context__


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a panic of a library in Rust into a RuntimeError: Python has it as no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(first_line(error)) from error
        raise


def pass_on_memory_error(error: BaseException) -> None:
    """For handlers that take a library's every error for bad input: memory is not the input's."""
    for cause in error_chain(error):
        if is_out_of_memory(cause):
            raise MemoryError(first_line(cause)) from error


@contextlib.contextmanager
def blaming(
    what: object, hint: str, kind: type[DepthcutError], code: str = "unreadable"
) -> Iterator[None]:
    """Names what a library fails on, by whatever class of error: bad input, as far as is known."""
    try:
        yield
    except DepthcutError:
        raise
    except Exception as error:
        pass_on_memory_error(error)
        raise kind(f"{what}: {first_line(error)}.", hint, code=code) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch's on the CPU has no class of its own."""
    result = str(error)
    return (
        isinstance(error, MemoryError)
        or "DefaultCPUAllocator: can't allocate" in result
        or "out of memory" in result
    )
