"""Errors to gRPC statuses: one table, used by every RPC."""

from typing import NoReturn

import grpc

from vivace.engine.errors import EngineError

RETRY_MS = 250  # what a refused client is told to wait: a few steps of a busy engine
MAX_DETAILS_CHARS = 512  # details travel as a header, and clients refuse headers over 16 KiB: this is 12 a character


class NotFound(EngineError):
    """No such model is served here."""

    code = "not_found"


class AlreadyExists(EngineError):
    """The request id is in use by a request that runs."""

    code = "already_exists"


class NotReady(EngineError):
    """The server is loading or draining."""

    code = "not_ready"


class Cancelled(EngineError):
    """Somebody aborted the request by its id."""

    code = "cancelled"


class DeadlineExceeded(EngineError):
    """The request's time ran out in the engine before gRPC noticed."""

    code = "deadline_exceeded"


STATUS = {
    "invalid_request": grpc.StatusCode.INVALID_ARGUMENT,
    "failed_precondition": grpc.StatusCode.FAILED_PRECONDITION,
    "unimplemented": grpc.StatusCode.UNIMPLEMENTED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,  # clients may retry this one
    "engine_died": grpc.StatusCode.UNAVAILABLE,
    "not_ready": grpc.StatusCode.UNAVAILABLE,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "cancelled": grpc.StatusCode.CANCELLED,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
}
RETRIABLE = ("overloaded", "not_ready")


def status_of(error: EngineError) -> grpc.StatusCode:
    """The status of an error that was raised on purpose."""
    return STATUS.get(error.code, grpc.StatusCode.INTERNAL)


async def abort(context: grpc.aio.ServicerContext, error: EngineError) -> NoReturn:
    """End the call with the error's status, and with a time to wait where a retry may help."""
    trailers = (("grpc-retry-pushback-ms", str(RETRY_MS)),) if error.code in RETRIABLE else ()
    await context.abort(status_of(error), _shortened(str(error)), trailers)
    raise AssertionError("abort returns never")


def _shortened(details: str) -> str:
    """Values come from the caller, who may have sent megabytes of them. The field's name stands in front."""
    if len(details) <= MAX_DETAILS_CHARS:
        return details
    return f"{details[:MAX_DETAILS_CHARS]}... ({len(details)} characters)"
