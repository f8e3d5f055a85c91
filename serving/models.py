"""What is served: models by name, and texts and conversations as their token ids."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from vivace.engine.chat import ChatEncoder
from vivace.engine.errors import InvalidRequest
from vivace.engine.events import EngineInfo
from vivace.engine.runtimes import Engine
from vivace.engine.sampling import GenerationDefaults, ModelLimits
from vivace.engine.tokenizer import LONG_TEXT_CHARS, Tokenizer
from vivace.serving import convert
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.status import NotFound, NotReady


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is loaded."""

    name: str
    engine: Engine
    info: EngineInfo
    tokenizer: Tokenizer
    chat: ChatEncoder
    defaults: GenerationDefaults

    @property
    def limits(self) -> ModelLimits:
        """What requests are measured against."""
        info = self.info
        return ModelLimits(
            info.vocab_size, info.max_context_tokens, self.defaults, sparse=info.sparse
        )

    @property
    def max_parallel(self) -> int:
        """Requests that one call may have in the engine at a time: what is computed at a time, so that it fills no queue, and
        no more than the queue takes at once, so that an idle engine refuses none of them."""
        return min(self.info.max_running, self.info.max_waiting)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        if len(text) < LONG_TEXT_CHARS:
            await asyncio.sleep(0)  # of many in one call, others have their turn between two
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def encode_prompt(self, prompt: pb.Prompt | pb.GenerateRequest, name: str) -> list[int]:
        """Token ids of a prompt that is text or has them already. `name` says which in what is raised."""
        kind = prompt.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest(f"{name} must be set: text or token_ids")
        if kind == "token_ids":
            return list(prompt.token_ids.ids)
        return await self.encode(prompt.text)

    async def encode_chat(self, request: pb.ChatRequest | pb.Conversation) -> list[int]:
        """Token ids of a conversation, as the chat template renders it."""
        return await self.chat.encode(convert.conversation(request))

    async def encode_continuation(
        self, prompt: pb.Prompt, prompt_ids: Sequence[int], continuation: pb.Prompt, name: str
    ) -> list[int]:
        """Token ids of what goes on from a prompt: where both are text, those of the whole that the prompt has not."""
        if prompt.WhichOneof("prompt") == continuation.WhichOneof("prompt") == "text":
            whole = await self.encode(prompt.text + continuation.text)
            if whole[: len(prompt_ids)] == list(prompt_ids):
                return whole[len(prompt_ids) :]
        if continuation.WhichOneof("prompt") == "text":  # their letters join across the border
            return await self.encode(continuation.text, add_special_tokens=False)
        return await self.encode_prompt(continuation, name)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token shows alone. Each is decoded once: a long text would keep a thread, and the GIL, for seconds."""

        def texts() -> list[str]:
            of_token = {one: self.tokenizer.token_text(one) for one in set(token_ids)}
            return [of_token[one] for one in token_ids]

        return await asyncio.to_thread(texts)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""
        return await asyncio.to_thread(
            self.tokenizer.decode, token_ids, skip_special_tokens=skip_special_tokens
        )


@dataclass(slots=True)
class Models:
    """Which names are served, and those of them that are loaded already."""

    names: Sequence[str]
    loaded: dict[str, ServedModel] = field(default_factory=dict)

    def find(self, name: str | None) -> ServedModel:
        """A model by its name; None will do where only one is served. Raises NotFound, InvalidRequest or NotReady."""
        served = " and ".join(map(repr, self.names))
        if name is None:
            if len(self.names) > 1:
                raise InvalidRequest(f"model must be set: {served} are served")
            [name] = self.names
        if name not in self.names:
            raise NotFound(f"model {name[:80]!r} is not served here; {served} is")
        if name not in self.loaded:
            raise NotReady(f"model {name!r} is loading")
        return self.loaded[name]
