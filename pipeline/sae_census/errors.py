"""What can go wrong, by who can mend it. Every message says what was given, what was expected, what to do."""


class CensusError(Exception):
    """Base of every error this project raises on purpose."""


class UserError(CensusError):
    """The user must change something: a path, a key, a file. Jobs print it in one line and exit with 2."""


class ConfigError(UserError):
    """A key of the config is unknown, missing or out of range."""


class NumericsError(ConfigError):
    """A worker's machine would compute other bits than the run was planned for."""


class RequestError(UserError):
    """A field of a request cannot be answered; `unknown` if it names something that is not there."""

    def __init__(self, message: str, field: str = "", *, unknown: bool = False):
        super().__init__(message)
        self.field, self.unknown = field, unknown


class DeadlineError(CensusError):
    """The time allowed for an answer is over."""


class ArgumentError(UserError, ValueError):
    """An argument of the Python API cannot be used; also a ValueError, which is what notebooks expect."""


class SourceError(UserError):
    """A corpus source cannot be read as what it claims to be."""


class CheckpointError(UserError):
    """A model or SAE on disk is not what its format promises."""


class IdentityError(UserError):
    """A store was made under settings that determine numbers and that differ from today's."""


class ShardError(CensusError):
    """A shard cannot be analysed and would fail again the same way: it is quarantined, not retried."""


class CorruptError(CensusError):
    """Bytes in the store are not those that its records name."""


class StorageError(UserError):
    """The store cannot take more bytes (full disk, read-only, gone): the run stops, nothing is lost."""
