"""The one place that catches an unexpected error: it becomes INTERNAL for that call alone, and a traceback in the log."""

import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler. Details say nothing of the inside: no paths, no names."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler, wrapped if it is of a kind that this service has."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        wrap = _guard_stream if handler.response_streaming else _guard_unary
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guard_stream(behavior: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async for response in behavior(request, context):
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - the boundary
            await _report(context)

    return guarded


def _guard_unary(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception:  # noqa: BLE001 - the boundary
            await _report(context)

    return guarded


async def _report(context: grpc.aio.ServicerContext) -> None:
    traceback.print_exc(file=sys.stderr)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has more")
