"""What a failed call raises: one class for each status that a caller may want to tell from others, in one table."""

import asyncio
from typing import Any

import grpc

PUSHBACK_KEY = "grpc-retry-pushback-ms"


class VivaceError(grpc.RpcError):
    """A call that failed, after whatever retries it was given. `retry_after_s`: how long the server asks to wait."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        retry_after_s: float | None = None,
        trailers: tuple[tuple[str, str | bytes], ...] = (),
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.retry_after_s = retry_after_s
        self._code = code
        self._details = details
        self._trailers = trailers

    def code(self) -> grpc.StatusCode:
        """The status."""
        return self._code

    def details(self) -> str:
        """What the server says of it; names the field where a field is at fault."""
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What came with the status."""
        return self._trailers


class InvalidArgument(VivaceError):
    """The request can never work; the details name the field."""


class NotFound(VivaceError):
    """No such model is served."""


class AlreadyExists(VivaceError):
    """The request id is in use."""


class FailedPrecondition(VivaceError):
    """This model cannot do it, as a chat without a chat template."""


class Unimplemented(VivaceError):
    """A field or RPC that this server does not serve."""


class Overloaded(VivaceError):
    """No room now, or a message over the limit (the details tell which)."""


class Unavailable(VivaceError):
    """The server cannot be reached, is loading or draining, or lost its engine."""


class DeadlineExceeded(VivaceError):
    """The time was up; it covers all tries."""


class Cancelled(VivaceError):
    """Somebody aborted the request, or the client was closed."""


class Internal(VivaceError):
    """A bug of the server; its log has more."""


ERRORS: dict[grpc.StatusCode, type[VivaceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: Internal,
}
STATUS = {code.value[0]: code for code in grpc.StatusCode}


def error_of(error: Any) -> VivaceError:
    """gRPC's error as ours; ours as it is."""
    if isinstance(error, VivaceError):
        return error
    trailers = tuple((key, value) for key, value in error.trailing_metadata() or ())
    asked_ms = pushback_ms(error)
    retry_after_s = None if asked_ms is None or asked_ms < 0 else asked_ms / 1e3
    kind = ERRORS.get(error.code(), VivaceError)
    return kind(error.code(), error.details() or "", retry_after_s, trailers)


def pushback_ms(error: Any) -> int | None:
    """How long the server asks to wait with a retry; negative: there is to be none; None: it does not say."""
    value = dict(error.trailing_metadata() or ()).get(PUSHBACK_KEY)
    try:
        return None if value is None else int(value)
    except ValueError:
        return -1  # as gRPC takes what it cannot read


def error_of_item(number: int, details: str) -> VivaceError:
    """The error of one item of a batch, from the number of its status."""
    code = STATUS.get(number, grpc.StatusCode.UNKNOWN)
    return ERRORS.get(code, VivaceError)(code, details)


def closed() -> Cancelled:
    """The error of a call that the closing of its client ended, or that came after it."""
    return Cancelled(grpc.StatusCode.CANCELLED, "the client is closed")


def is_task_cancelled() -> bool:
    """Whether somebody cancelled this task. If not, a CancelledError is gRPC's word for a call that ended under it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
