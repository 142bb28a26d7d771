"""Every failure a user can cause has its own exception, all of them below `EigencacheError`.

The command line prints the message of an `EigencacheError` as one line and exits with code 2; a
traceback therefore always means a defect of the program, never a mistake of its user.
"""


class EigencacheError(Exception):
    """A failure with one clear line for the user: what was wrong, where, and what to do."""


class ModelError(EigencacheError):
    """A model could not be found, read or run."""


class NoCacheError(ModelError):
    """The model has no key-value cache that could be looked at."""


class UnsupportedArchitectureError(ModelError):
    """The architecture caches something this version cannot interpret."""


class LayerError(EigencacheError):
    """A layer was named that does not exist or holds no cache."""


class CorpusError(EigencacheError):
    """A text could not be found or read, or there is too little of it."""


class TokenizerMismatchError(EigencacheError):
    """The tokenizer produces ids that the model does not know."""


class NonFiniteError(EigencacheError):
    """NaN or infinite activations were captured; the message names layer, kind and head."""


class RecordError(EigencacheError):
    """A results file is missing, damaged, or of another schema version."""


class OutputError(EigencacheError):
    """An output path cannot be written."""


class MissingPackageError(EigencacheError):
    """An optional package is not installed; the message names the command that installs it."""


class StatisticsError(EigencacheError):
    """A statistic was asked of data that cannot support it."""


class CodecError(EigencacheError):
    """A codec and a cache do not fit each other, or a cache cannot be encoded without loss of a value."""


class ContainerError(CodecError):
    """An encoded sequence cannot be written or read."""


class NotAContainerError(ContainerError):
    """The bytes do not begin as an encoded sequence does."""


class ContainerVersionError(ContainerError):
    """The container is of a version this release does not read."""


class TruncatedContainerError(ContainerError):
    """The container ends before its header or its sections do."""


class OverlongContainerError(ContainerError):
    """Bytes follow the container's last section."""


class ContainerHeaderError(ContainerError):
    """The header's checksum is wrong, or its fields contradict each other or exceed a cap."""


class ContainerChecksumError(ContainerError):
    """A section of the container is damaged; the message says which."""


class ForeignContainerError(ContainerError):
    """The container was written by another codec."""


class BudgetError(EigencacheError):
    """A budget is no loss that could be allowed."""


class TrainingError(EigencacheError):
    """An adapter cannot be trained as asked, or its training diverged."""
