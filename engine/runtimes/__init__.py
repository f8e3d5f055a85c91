"""The `Engine` protocol: what serving needs of whatever runs the model. Asynchronous; token ids in, token ids out."""

from collections.abc import AsyncGenerator
from typing import Protocol

from vivace.engine.events import EngineInfo, EngineRequest, Loads, TokenEvent


class Engine(Protocol):
    """A running model. One per served model; owned by one asyncio loop."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[TokenEvent]:
        """Events of one request, in order; the last one has `finish`. Closing the generator early aborts the request.

        Raises Overloaded (before any event) or EngineDied.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """End a request early; its stream then gets its final event. False if there is no such request."""
        ...

    async def info(self) -> EngineInfo:
        """What is served. Waits until the engine is ready; raises EngineDied or what kept it from loading."""
        ...

    async def loads(self) -> Loads:
        """How busy it is. Raises EngineDied."""
        ...

    async def died(self) -> str:
        """Wait until the engine process is gone or silent, and say why in one line. Never returns while it is well."""
        ...

    async def close(self) -> None:
        """Abort what still runs and give everything back. Idempotent."""
        ...
