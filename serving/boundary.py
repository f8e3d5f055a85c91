"""Where what nobody expected ends: an error that escapes a handler, a request that is no protobuf.

The one becomes INTERNAL for that call alone, with a traceback in the log; the other INVALID_ARGUMENT.
"""

import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler of one service: the standard ones look after themselves. Details say nothing of the inside."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler, wrapped if it is the service's."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        wrap = _guard_stream if handler.response_streaming else _guard_unary
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind)),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """None for what cannot be read: gRPC itself would answer UNKNOWN."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return None

    return read


def _guard_stream(
    behavior: Callable[..., AsyncGenerator[Any]],
) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            if request is None:
                await _refuse(context)
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - the boundary
            await _report(context)

    return guarded


def _guard_unary(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if request is None:
                await _refuse(context)
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - the boundary
            await _report(context)

    return guarded


async def _refuse(context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is not valid protobuf")


async def _report(context: grpc.aio.ServicerContext) -> None:
    traceback.print_exc(file=sys.stderr)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has more")
