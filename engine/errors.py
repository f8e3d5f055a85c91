"""Errors a caller can cause or must handle. Everything else is a bug: let it crash."""

MAX_MESSAGE = 1000


class EngineError(Exception):
    """Base of all errors the engine raises on purpose. `code` is stable and goes over the wire."""

    code = "internal"


class InvalidRequest(EngineError):
    """The request can never succeed as written. The message names the field and the value."""

    code = "invalid_request"


class FailedPrecondition(EngineError):
    """The request is well formed, but this model cannot serve it (no chat template)."""

    code = "failed_precondition"


class Unimplemented(EngineError):
    """The request sets a field that this version knows and does not serve yet."""

    code = "unimplemented"


class Overloaded(EngineError):
    """The queue is full; the same request may succeed later."""

    code = "overloaded"


class Cancelled(EngineError):
    """Somebody ended the request by its id."""

    code = "cancelled"


class DeadlineExceeded(EngineError):
    """The request's time ran out in the engine before its caller noticed."""

    code = "deadline_exceeded"


class EngineDied(EngineError):
    """The engine process is gone or silent; nothing can be served by it any more."""

    code = "engine_died"


class ConfigError(EngineError):
    """The configuration is wrong. The message names the field and what is allowed."""

    code = "config"


class ArtifactError(EngineError):
    """A checkpoint cannot be used. The message names the file, tensor or architecture, in one
    printable line whatever a hostile one put into their names."""

    code = "artifact"

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text with escapes for what would steer a terminal or is no text: control characters, half
    surrogate pairs. At most 1,000 characters."""
    short = text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 3]}..."
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short
    )
