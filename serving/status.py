"""Errors to gRPC statuses: one table, used by every RPC."""

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from vivace.engine.errors import EngineError

RETRY_MS = 250  # what a refused client is told to wait: a few steps of a busy engine
MAX_DETAILS_CHARS = 512  # details travel as a header, and clients refuse headers over 16 KiB: this is 12 a character
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
NO_RETRY = ((PUSHBACK_KEY, "-1"),)  # clients retry by the status, which does not tell


class NotFound(EngineError):
    """No such model is served here."""

    code = "not_found"


class AlreadyExists(EngineError):
    """The request id is in use by a request that runs."""

    code = "already_exists"


class NotReady(EngineError):
    """The server is loading or draining."""

    code = "not_ready"


class SlowReader(EngineError):
    """The client has not read its stream for too long."""

    code = "slow_reader"


class TooLarge(EngineError):
    """A part of the call is over the limit of its size. The same call will never fit."""

    code = "too_large"


STATUS = {
    "invalid_request": grpc.StatusCode.INVALID_ARGUMENT,
    "failed_precondition": grpc.StatusCode.FAILED_PRECONDITION,
    "unimplemented": grpc.StatusCode.UNIMPLEMENTED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,  # clients may retry this one
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "slow_reader": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "engine_died": grpc.StatusCode.UNAVAILABLE,
    "not_ready": grpc.StatusCode.UNAVAILABLE,
    "not_found": grpc.StatusCode.NOT_FOUND,
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "cancelled": grpc.StatusCode.CANCELLED,
    "deadline_exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
}
RETRIABLE = (
    "overloaded",
    "not_ready",
    "engine_died",
)  # the last on another server, or this one started anew


def status_of(error: EngineError) -> grpc.StatusCode:
    """The status of an error that was raised on purpose."""
    return STATUS.get(error.code, grpc.StatusCode.INTERNAL)


def details_of(error: EngineError) -> str:
    """What the client is told. Values come from the caller, who may have sent megabytes of them; the field's name
    stands in front."""
    details = str(error)
    if len(details) <= MAX_DETAILS_CHARS:
        return details
    return f"{details[:MAX_DETAILS_CHARS]}... ({len(details)} characters)"


async def abort(context: grpc.aio.ServicerContext, error: EngineError) -> NoReturn:
    """End the call with the error's status, and with a time to wait where a retry may help: else with gRPC's word for none."""
    code, details = status_of(error), details_of(error)
    trailers = _retry_trailers(code, details) if error.code in RETRIABLE else NO_RETRY
    await context.abort(code, details, trailers)
    raise AssertionError("abort returns never")


def _retry_trailers(code: grpc.StatusCode, details: str) -> tuple[tuple[str, str | bytes], ...]:
    """The time to wait, twice: as gRPC's own retries read it, and as google.rpc.RetryInfo."""
    wait = AnyMessage()
    wait.Pack(RetryInfo(retry_delay=Duration(nanos=RETRY_MS * 1_000_000)))
    status = Status(code=code.value[0], message=details, details=[wait])
    return ((PUSHBACK_KEY, str(RETRY_MS)), (DETAILS_KEY, status.SerializeToString()))
