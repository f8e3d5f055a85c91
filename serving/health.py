"""The standard health service, the same for all that it is asked of. Decides nothing: the server says when it changes.

Not the servicer of grpcio-health-checking: that one holds a lock while it writes, so that a single watcher who does not read
keeps every change, and with it the server's end, from coming about.
"""

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vivace.serving.status import NotFound

Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """NOT_SERVING until told otherwise. Knows `services`, and "", which stands for the server."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = frozenset(("", *services))
        self._status: int = Response.NOT_SERVING
        self._changed = asyncio.Event()  # a new one after each change

    def set(self, status: int) -> None:
        """Of all services; watchers are told in their own time."""
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """How a service is now."""
        if request.service not in self._services:
            raise NotFound(f"service {request.service[:80]!r} is not served here")
        return Response(status=self._status)

    async def List(
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthListResponse:
        """How all are now."""
        now = Response(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, now))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """How a service is now, and whenever that changes."""
        if request.service not in self._services:
            await context.write(Response(status=Response.SERVICE_UNKNOWN))
            await asyncio.Event().wait()  # as the protocol has it: it might come to be served
        last = None
        while True:
            changed = self._changed
            if self._status == last:
                await changed.wait()
                continue
            last = self._status
            await context.write(Response(status=last))
