"""Several coroutines for one caller: the first error ends all, and none outlives the caller."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def run_all(coroutines: Sequence[Coroutine[None, None, T]], *, max_parallel: int) -> list[T]:
    """What they return, in their order; at most so many run at a time. The first error cancels the rest and is raised."""
    places = asyncio.Semaphore(max_parallel)

    async def one(coroutine: Coroutine[None, None, T]) -> T:
        async with places:
            return await coroutine

    tasks = [asyncio.create_task(one(coroutine)) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)
        for coroutine in coroutines:
            coroutine.close()  # those whose turn never came


async def merge(generators: Sequence[AsyncGenerator[T]], *, max_parallel: int) -> AsyncGenerator[T]:
    """What they yield, as it comes; at most so many run at a time. The first error closes the rest and is raised."""
    queue: asyncio.Queue[tuple[T] | None] = asyncio.Queue(max_parallel)  # None: nothing more comes
    is_left = False

    async def read(generator: AsyncGenerator[T]) -> None:
        async with aclosing(generator) as items:
            async for item in items:
                await queue.put((item,))

    async def read_all() -> None:
        try:
            await run_all([read(one) for one in generators], max_parallel=max_parallel)
        finally:
            if not is_left:
                await queue.put(None)

    reading = asyncio.create_task(read_all())
    try:
        while (item := await queue.get()) is not None:
            yield item[0]
        await reading
    finally:
        is_left = True
        await _end([reading])


async def within(generator: AsyncGenerator[T], places: asyncio.Semaphore) -> AsyncGenerator[T]:
    """What it yields; it begins when one of `places` is free, and has that until it ends."""
    async with places, aclosing(generator) as items:
        async for item in items:
            yield item


async def _end(tasks: Sequence["asyncio.Task[T]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
