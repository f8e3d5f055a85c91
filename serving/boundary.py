"""Where errors become statuses, for every RPC: those raised on purpose by their table, a request that is no protobuf, and
what nobody expected.

The last becomes INTERNAL for that call alone, with a traceback in the log.
"""

import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from vivace.engine.errors import EngineError, InvalidRequest
from vivace.serving import status
from vivace.serving.request_log import say
from vivace.serving.status import TooLarge

ENTRY_BYTES = 32


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler, those of the standard services too. Details say nothing of the inside."""

    def __init__(self, *, max_metadata_bytes: int) -> None:
        self._max_metadata_bytes = max_metadata_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        size = metadata_bytes(handler_call_details.invocation_metadata)
        refusal = None
        if (
            size > self._max_metadata_bytes
        ):  # gRPC tells clients of its limit, and takes more from those that ignore it
            refusal = TooLarge(
                f"metadata must be at most {self._max_metadata_bytes} bytes, got {size}"
            )
        takes, gives = (
            "stream" if streams else "unary"
            for streams in (handler.request_streaming, handler.response_streaming)
        )
        behavior = getattr(handler, f"{takes}_{gives}")
        make = getattr(grpc, f"{takes}_{gives}_rpc_method_handler")
        return make(
            _guarded(_writing(behavior) if handler.request_streaming else behavior, refusal),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def metadata_bytes(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """As HTTP/2 counts a list of headers (RFC 9113, 6.5.2)."""
    return sum(len(key) + len(value) + ENTRY_BYTES for key, value in metadata)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """None for what cannot be read: gRPC itself would answer UNKNOWN."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return None

    return read


def _writing(behavior: Callable[..., AsyncGenerator[Any]]) -> Callable[..., Awaitable[None]]:
    """A handler that takes requests and yields responses, which is how reflection's is written, as one that writes them."""

    async def readable(requests: AsyncIterable[Any]) -> AsyncGenerator[Any]:
        async for request in requests:
            yield _checked(request)

    async def write(requests: AsyncIterable[Any], context: grpc.aio.ServicerContext) -> None:
        async with aclosing(behavior(readable(requests), context)) as responses:
            async for response in responses:
                await context.write(response)

    return write


def _checked(request: Any) -> Any:
    """What `_tolerant` could read. Raises InvalidRequest."""
    if request is None:
        raise InvalidRequest("the request is not valid protobuf")
    return request


def _guarded(
    behavior: Callable[..., Awaitable[Any]], refusal: EngineError | None
) -> Callable[..., Awaitable[Any]]:
    """Of a handler that returns its response, or writes them. `refusal`: what it ends with at once."""

    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if refusal is not None:
                raise refusal
            return await behavior(_checked(request), context)
        except grpc.aio.AbortError:
            raise
        except EngineError as error:
            await status.abort(context, error)
        except Exception:  # noqa: BLE001 - the boundary
            say(traceback.format_exc().rstrip(), sys.stderr)
            await context.abort(
                grpc.StatusCode.INTERNAL, "internal error; the server's log has more"
            )

    return guarded
