"""Messages: whole; those of many logprobs are made while others have their turn."""

import asyncio

import pytest

from vivace.engine.completion import TextEvent
from vivace.engine.events import FinishReason, Loads, TokenLogprobs, Usage
from vivace.engine.scoring import Score
from vivace.serving import convert

PLACES = tuple(
    TokenLogprobs(token, -token / 8, 1, ((token, -token / 8), (0, -99.0))) for token in range(3000)
)
USAGE = Usage(3000, 0, 1, 0.0, 0.0, 0.0, 0)
EVENT = TextEvent("r", "x", (1,), PLACES, PLACES, FinishReason.STOP, usage=USAGE)


async def streamed():
    return await convert.response(EVENT)


async def unary():
    return await convert.unary_response("r", [EVENT])


async def scored():
    score = Score(PLACES)
    return await convert.score_response(
        "r", [score], prompt_tokens=3, prompt_logprobs=PLACES, shows_places=True
    )


@pytest.mark.parametrize("make", [streamed, unary, scored])
def test_others_have_their_turn_while_a_large_message_is_made(make):
    num_turns = 0

    async def run():
        nonlocal num_turns
        making = asyncio.create_task(make())
        while not making.done():
            num_turns += 1
            await asyncio.sleep(0)
        return await making

    message = asyncio.run(run())
    inner = message.replies if make is unary else message.scores if make is scored else [message]
    for found in (message.prompt_logprobs, inner[0].logprobs):
        assert [place.token_id for place in found] == list(range(3000))
        assert [place.logprob for place in found] == [place.logprob for place in PLACES]
    assert num_turns >= 2 * (len(PLACES) // convert.PLACES_AT_ONCE)


def test_the_loads_of_experts_are_told_layer_by_layer():
    message = convert.loads(Loads(num_steps=3, expert_loads=((1, 2, 0), (0, 0, 2**40))))
    assert message.num_steps == 3 and message.num_running == 0
    layers = [list(layer.num_tokens) for layer in message.expert_loads]
    assert layers == [[1, 2, 0], [0, 0, 2**40]]
