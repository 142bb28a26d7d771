"""Exceptions for every failure that a user can cause, all derived from `EigencacheError`.

The command line prints the message of an `EigencacheError` as one line and exits with code 2. A traceback is therefore
always a defect of the program and never a mistake of its user. A message names parameters in backticks, `max_nll`; the
command line replaces them by its flags.
"""


class EigencacheError(Exception):
    """Base class. The message is one line: what is wrong, the value, the file or parameter, and what to do."""


class ModelError(EigencacheError):
    """The model cannot be found, loaded or run."""


class NoCacheError(ModelError):
    """The model has no key-value cache."""


class UnsupportedArchitectureError(ModelError):
    """The architecture, or a module of it, is not supported for the requested operation."""


class LayerError(EigencacheError):
    """A requested layer does not exist or has no cache."""


class CorpusError(EigencacheError):
    """The text cannot be found or read, is too short, or overlaps the calibration text."""


class TokenizerMismatchError(EigencacheError):
    """The tokenizer has token ids that the model does not embed."""


class NonFiniteError(EigencacheError):
    """The captured activations contain NaN or infinite values; the message names layer, kind and head."""


class RecordError(EigencacheError):
    """A results file is missing or damaged, or has another schema version."""


class OutputError(EigencacheError):
    """An output path cannot be written."""


class MissingPackageError(EigencacheError):
    """An optional package is not installed; the message names the command that installs it."""


class StatisticsError(EigencacheError):
    """The data are too few, or not finite, for the requested statistic."""


class CodecError(EigencacheError):
    """The codec does not match the cache or the model, or a value of the cache cannot be represented."""


class ContainerError(CodecError):
    """A container, the bytes of one encoded sequence, cannot be written or read."""


class NotAContainerError(ContainerError):
    """The bytes do not begin with the magic number of a container."""


class ContainerVersionError(ContainerError):
    """The format version of the container is not supported by this release."""


class TruncatedContainerError(ContainerError):
    """The container ends inside its header or one of its sections."""


class OverlongContainerError(ContainerError):
    """The container has bytes after its last section."""


class ContainerHeaderError(ContainerError):
    """The checksum of the header is wrong, or its fields contradict each other or exceed a limit."""


class ContainerChecksumError(ContainerError):
    """The checksum of a section is wrong; the message names the section."""


class ForeignContainerError(ContainerError):
    """The container was written by another codec."""


class BudgetError(EigencacheError):
    """Invalid or unreachable loss budget."""


class TrainingError(EigencacheError):
    """The training options of an adapter are invalid, or its training diverged."""


REFUSALS: tuple[type[EigencacheError], ...] = (
    StatisticsError,
    CodecError,
    BudgetError,
    NonFiniteError,
    UnsupportedArchitectureError,
)  # errors of a codec that does not suit a model or a text; a comparison leaves it out and measures the others
