"""Conversations and a tokenizer to try templates with."""

import asyncio
from pathlib import Path

from vivace.engine.chat import ChatEncoder
from vivace.engine.conversation import ChatMessage
from vivace.engine.tokenizer import Tokenizer

NORTHSTAR = Path(__file__).parents[2] / "examples" / "northstar"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder(directory, template):
    """northstar's tokenizer under another template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((NORTHSTAR / name).read_bytes())
    (directory / "chat_template.jinja").write_text(template)
    return ChatEncoder(Tokenizer.load(directory))


def encode(chat, *conversations):
    """Ids of each, by one worker; what it raises instead."""

    async def run():
        await chat.start()
        try:
            return [await chat.encode(conversation) for conversation in conversations]
        finally:
            await chat.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def turns(*pairs):
    return [ChatMessage(role, content) for role, content in pairs]


HONEST = turns(
    ("system", "Be brief. 请简短"),
    ("user", "  if a < b and c[0] > d: print('<b>') 👩‍👩‍👧 "),
    ("assistant", "Yes < no\n"),
    ("user", "|> <| im_end |> < |im_end|> ＜ ＜|"),
)
