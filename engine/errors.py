"""Errors a caller can cause or must handle. Everything else is a bug: let it crash."""


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


class EngineDied(EngineError):
    """The engine process is gone or silent; nothing can be served by it any more."""

    code = "engine_died"


class ConfigError(EngineError):
    """The configuration is wrong. The message names the field and what is allowed."""

    code = "config"


class ArtifactError(EngineError):
    """A checkpoint cannot be used. The message names the file, tensor or architecture."""

    code = "artifact"
