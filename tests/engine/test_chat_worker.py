"""The process that runs a template: its limits, its end, and whoever waits for it."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from tests.engine.chats import CHATML, HONEST, encode, encoder, turns
from vivace.engine import chat_worker
from vivace.engine.chat import Link
from vivace.engine.conversation import Conversation
from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest, Overloaded

HANGS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "power": "{{ messages | length ** 99999999 }}{{ (messages | length + 9) ** 999999999 }}",
    "memory": "{% set a = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set a.s = a.s ~ a.s %}{% endfor %}",
    "output": "{{ 'x' * 9000000 }}{{ messages | length }}",
    "constant": "{{ 'x' * 99999999999 }}",
    "format": "{{ '%999999999999d' % (messages | length) }}",
}


@pytest.mark.parametrize("name", HANGS)
def test_a_template_that_takes_too_much_is_ended(tmp_path, name):
    chat = encoder(tmp_path, HANGS[name])
    with pytest.raises((FailedPrecondition, ArtifactError, InvalidRequest), match="template"):
        encode(chat, Conversation(HONEST))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ namespace.__init__.__globals__ }}{{ raise_exception('no') }}",
        "{{ self.__init__.__globals__.x.y }}",
        "{{ raise_exception.__globals__.json.x }}",
    ],
)
def test_a_template_reaches_nothing(tmp_path, template):
    with pytest.raises((InvalidRequest, FailedPrecondition)) as error:
        encode(encoder(tmp_path, template), Conversation(HONEST))
    assert "uid=" not in str(error.value)


def test_others_are_served_after_one_that_hangs(tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'hang' %}"
        + HANGS["loops"]
        + "{% endif %}{{ m.content }}{% endfor %}"
    )
    chat = encoder(tmp_path, template)

    async def run():
        await chat.start()
        try:
            good, hang = (Conversation(turns(("user", text))) for text in ("good", "hang"))
            return await asyncio.gather(
                chat.encode(good), chat.encode(hang), chat.encode(good), return_exceptions=True
            )
        finally:
            await chat.close()

    first, second, third = asyncio.run(asyncio.wait_for(run(), 60))
    assert first == third != []
    assert isinstance(second, FailedPrecondition) and "1 s" in str(second)


def test_a_worker_that_dies_is_replaced_and_a_caller_that_leaves_takes_only_its_own(tmp_path):
    chat = encoder(tmp_path, CHATML)

    async def run():
        await chat.start()
        try:
            want = await chat.encode(Conversation(HONEST))
            left = asyncio.create_task(chat.encode(Conversation(turns(("user", "another")))))
            await asyncio.sleep(0)
            left.cancel()
            assert await chat.encode(Conversation(HONEST)) == want
            os.kill(chat._worker._link.process.pid, signal.SIGKILL)
            assert await chat.encode(Conversation(HONEST)) == want
        finally:
            await chat.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_worker_that_always_dies_is_not_tried_for_ever(tmp_path, monkeypatch):
    chat = encoder(tmp_path, CHATML)
    opened = []

    async def run():
        await chat.start()
        link_open = Link.open

        async def dying():
            link = await link_open()
            opened.append(link)
            link.process.kill()
            return link

        monkeypatch.setattr(Link, "open", dying)
        await chat._worker._end()
        try:
            with pytest.raises(FailedPrecondition, match="has died"):
                await chat.encode(Conversation(HONEST))
        finally:
            await chat.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(opened) == 2
    assert all(link.process.poll() is not None for link in opened)


def test_a_worker_that_is_stopped_keeps_others_waiting_for_a_while_only(tmp_path, monkeypatch):
    monkeypatch.setattr("vivace.engine.chat.ANSWER_LIMIT_S", 0.2)
    chat = encoder(tmp_path, CHATML)

    async def run():
        await chat.start()
        try:
            want = await chat.encode(Conversation(HONEST))
            os.kill(chat._worker._link.process.pid, signal.SIGSTOP)
            with pytest.raises(FailedPrecondition, match=r"no answer for 1\.2 s"):
                await chat.encode(Conversation(HONEST))
            assert await chat.encode(Conversation(HONEST)) == want
        finally:
            await chat.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_caller_that_leaves_while_the_worker_starts_leaves_no_process(monkeypatch):
    started = []
    popen = subprocess.Popen

    def noted(*arguments, **named):
        started.append(popen(*arguments, **named))
        return started[-1]

    async def never(**_):
        await asyncio.sleep(60)

    async def run():
        monkeypatch.setattr("vivace.engine.chat.subprocess.Popen", noted)
        monkeypatch.setattr("vivace.engine.chat.asyncio.open_connection", never)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Link.open(), 0.1)

    asyncio.run(run())
    assert [process.poll() for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ cycler() }}", "at least one item"),
        ("{{ messages | map('upper', 1) | list }}", "template says"),
        ("{% set x = messages[0].content.encode('ascii') %}", "template says"),
    ],
)
def test_what_goes_wrong_in_a_template_is_its_own_complaint(tmp_path, template, words):
    with pytest.raises(InvalidRequest, match=words):
        encode(encoder(tmp_path, template), Conversation(turns(("user", "ü"))))


def test_a_template_that_python_cannot_compile_is_refused_at_the_start(tmp_path):
    deep = "".join(f"{{% for a{i} in [1] %}}" for i in range(30)) + "{% endfor %}" * 30
    with pytest.raises(ArtifactError, match="nested blocks"):
        encode(encoder(tmp_path, deep), Conversation(HONEST))


def test_the_worker_loads_little_and_ends_with_its_parent():
    code = (
        "import sys, vivace.engine.chat_worker as w;"
        "sys.exit(any(n in sys.modules for n in ('numpy', 'grpc', 'tokenizers', 'asyncio', 'torch')))"
    )
    worker = asyncio.run(_run_python(code))
    assert worker == 0

    async def eof():
        process = await asyncio.create_subprocess_exec(
            *_command("-m", chat_worker.__name__), stdin=asyncio.subprocess.PIPE
        )
        process.stdin.close()
        return await asyncio.wait_for(process.wait(), 20)

    assert asyncio.run(eof()) == 0


def _command(*words):
    return (sys.executable, "-P", *words)


async def _run_python(code):
    process = await asyncio.create_subprocess_exec(*_command("-c", code))
    return await process.wait()


def test_callers_that_leave_while_they_wait_are_not_rendered(tmp_path, monkeypatch):
    chat = encoder(tmp_path, CHATML)
    asked = []
    ask = Link.ask

    async def noted(link, frame):
        asked.append(frame)
        return await ask(link, frame)

    monkeypatch.setattr(Link, "ask", noted)

    async def run():
        await chat.start()
        try:
            want = await chat.encode(Conversation(HONEST))
            asked.clear()
            left = [asyncio.create_task(chat.encode(Conversation(HONEST))) for _ in range(30)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for task in left:
                task.cancel()
            assert await chat.encode(Conversation(HONEST)) == want
            await asyncio.gather(*left, return_exceptions=True)
        finally:
            await chat.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(asked) <= 2  # the one on its way, and the one that stayed


def test_too_many_that_wait_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vivace.engine.chat.MAX_WAITING", 3)
    chat = encoder(tmp_path, CHATML)

    async def run():
        await chat.start()
        try:
            calls = [chat.encode(Conversation(HONEST)) for _ in range(9)]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await chat.close()

    ends = asyncio.run(asyncio.wait_for(run(), 60))
    refused = [end for end in ends if isinstance(end, Overloaded)]
    assert len(refused) == 5  # one is rendered, three wait
    assert all(isinstance(end, (list, Overloaded)) for end in ends)
