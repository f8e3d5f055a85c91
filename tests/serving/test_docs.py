"""The pages of the API: each RPC has one, its examples run and print what it says, and every name in them exists."""

import contextlib
import io
import json
import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format

from vivace.engine.config import ServeConfig
from vivace.engine.config_file import FLAGS
from vivace.serving.convert import SERVED
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.request_log import LogEntry, RequestLog

DOCS = Path(__file__).parents[2] / "docs"
API = DOCS / "api"
METHODS = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name
MESSAGES = pb.DESCRIPTOR.message_types_by_name
MAP = DOCS / "from-openai-or-vllm.md"
PAGES = [*sorted(API.glob("*.md")), DOCS / "errors.md", MAP]

# A Python block, and what it prints where that is a block right behind it.
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\nIt prints:\n\n```text\n(.*?)```)?", re.DOTALL)
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
GRPCURL = re.compile(r"^grpcurl -plaintext -d '(.*)' 127\.0\.0\.1:50051 (\S+)/(\w+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)\)")
FIELD = re.compile(r"`([a-z][a-z0-9_]*)`")
CAPITALS = re.compile(r"\b[A-Z]+(?:_[A-Z]+)+\b")
SETTING = re.compile(r"\b((?:server|scheduler|cache|cpu|gpu|sparse|weights)\.[a-z_]+)\b")

# In backticks, and no field of the API: values, roles, and words of other pages' APIs.
WORDS = {"true", "false", "stop", "length", "system", "developer", "max_retries"}
THEIRS = {
    "chat_template", "chat_template_kwargs", "choices", "delta", "detokenize", "finish_reason",
    "guided_json", "max_completion_tokens", "metadata", "response_format", "service_tier",
    "stop_reason", "store", "structured_outputs", "timeout", "top_logprobs", "user",
}  # fmt: skip


def read(page):
    """A page's text."""
    return page.read_text(encoding="utf-8")


def prose(page):
    """A page's text without its blocks."""
    return BLOCK.sub("", read(page))


def examples():
    """Every Python block: its page, its code, what it prints."""
    return [
        pytest.param(code, printed, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (code, printed) in enumerate(EXAMPLE.findall(read(page)))
    ]


def words_of(rpc):
    """What the page of an RPC says, with the pages of the API that it leans on and those that are for all."""
    text = read(API / f"{rpc}.md")
    leant_on = {API / link for link in LINK.findall(text) if "/" not in link}
    pages = leant_on | {API / "README.md", API / "sampling.md"}
    return set(re.findall(r"\w+", text + "".join(map(read, pages))))


@pytest.mark.parametrize(("code", "printed"), examples())
def test_an_example_runs_and_prints_what_its_page_says(server, code, printed):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("127.0.0.1:50051", server.target), {})  # noqa: S102 - our own page
    assert out.getvalue() == printed if printed else out.getvalue().strip()


@pytest.mark.parametrize("rpc", METHODS)
def test_an_rpc_has_an_example_in_python_and_one_for_grpcurl(rpc):
    text = read(API / f"{rpc}.md")
    assert EXAMPLE.search(text)
    [(data, service, method)] = GRPCURL.findall(text)
    assert (service, method) == (pb.DESCRIPTOR.services_by_name["Inference"].full_name, rpc)
    json_format.Parse(data, getattr(pb, METHODS[rpc].input_type.name)())


@pytest.mark.parametrize("rpc", METHODS)
def test_a_page_tells_of_every_field_of_request_and_response(rpc):
    names = {*METHODS[rpc].input_type.fields_by_name, *METHODS[rpc].output_type.fields_by_name}
    assert names - words_of(rpc) == set()


def test_no_block_of_python_goes_unrun():
    count = sum(read(page).count("```python") for page in PAGES)
    assert count == len(examples()) >= len(METHODS)


def test_every_rpc_and_page_is_in_the_index():
    links = LINK.findall(read(API / "README.md"))
    assert {path.stem for path in API.glob("*.md")} == {*METHODS, "README", "sampling"}
    assert {f"{rpc}.md" for rpc in METHODS} | {"sampling.md"} <= set(links)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    assert [link for link in LINK.findall(read(page)) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_exists(page):
    """Fields of the API, statuses and values of enums, settings."""
    known = {name for message in MESSAGES.values() for name in message.fields_by_name} | WORDS
    if page == MAP:
        known |= THEIRS
    assert set(FIELD.findall(prose(page))) - known == set()
    capitals = {status.name for status in grpc.StatusCode} | {
        value.name
        for message in MESSAGES.values()
        for enum in message.enum_types
        for value in enum.values
    }
    assert set(CAPITALS.findall(prose(page))) - capitals - {"VLLM_CPU_KVCACHE_SPACE"} == set()
    config = ServeConfig()
    for setting in SETTING.findall(read(page)):
        section, name = setting.split(".")
        assert hasattr(getattr(config, section), name), setting


def test_the_words_that_are_no_fields_are_used():
    """Else the lists above would let stale names pass."""
    named = set().union(*(FIELD.findall(prose(page)) for page in PAGES))
    assert named >= WORDS | THEIRS


def test_what_is_not_served_is_listed_whole():
    listed = set(FIELD.findall(read(API / "sampling.md").split("## Not served yet")[1]))
    refused = {
        name
        for message, served in SERVED.items()
        for name in {*MESSAGES[message].fields_by_name} - served
    }
    assert listed == refused


def test_the_flags_of_the_map_are_those_of_serve():
    rows = read(MAP).split("## Server")[1]
    ours = [row.rsplit("|", 2)[1] for row in rows.splitlines() if row.startswith("| ")]
    flags = {flag for cell in ours for flag in re.findall(r"--([a-z-]+)", cell)}
    assert flags and flags - {*FLAGS, "name", "config", "set"} == set()


def test_the_line_of_the_log_is_as_its_page_shows_it():
    [block] = re.findall(r"```json\n(.*?)```", read(DOCS / "errors.md"), re.DOTALL)
    out = io.StringIO()
    RequestLog(out).write(LogEntry(id="one", rpc="Generate"))
    assert list(json.loads(block)) == list(json.loads(out.getvalue()))
