"""Errors of the shard directories. What a user can mend is a ValueError, which commands print without a traceback."""

from __future__ import annotations


class DatasetError(ValueError):
    """A shard directory that cannot be used; the message says what to do."""


class NotADatasetError(DatasetError):
    """There is no shard directory, its build is unfinished, or it was written by something else."""


class FormatVersionError(DatasetError):
    """The directory is in a version of the format that this program does not read."""


class EmptySplitError(DatasetError):
    """The split does not exist or has no samples."""


class MissingShardError(DatasetError):
    """A shard or index that the manifest lists is not there."""


class CorruptShardError(DatasetError):
    """Bytes on disk are not the bytes that were written; names the shard and the sample."""


class UnsafeShardError(DatasetError):
    """A shard or its URL asks for more than reading plain arrays: a path out of its directory, a link, a
    pickle, a shell command."""


class CodecMismatchError(DatasetError):
    """The codes were made by another codec."""


class FingerprintMismatchError(DatasetError):
    """The codes, or a saved position, belong to other token shards."""


class MixtureError(DatasetError):
    """The datasets of a mixture do not fit together."""


class SourceError(ValueError):
    """The text cannot be read: files missing, a column missing, no network."""


class WorkerError(ValueError):
    """A process that builds or reads data was killed from outside; a build keeps what is done."""
