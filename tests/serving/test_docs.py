"""The pages of the API: each RPC has one, its example runs as it stands and prints what it says, its names exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

DOCS = Path(__file__).parents[2] / "docs"
API = DOCS / "api"
RPCS = sorted(pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name)
PAGES = [*sorted(API.glob("*.md")), DOCS / "errors.md", DOCS / "from-openai-or-vllm.md"]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\nIt prints:\n\n```text\n(.*?)```)?", re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")
NAME = re.compile(r"`([a-z]+(?:_[a-z]+)+)`")
NOT_FIELDS = {
    "max_completion_tokens",
    "top_logprobs",
    "chat_template_kwargs",
    "chat_template",
    "service_tier",
    "response_format",
    "served_model_name",
}


def fields():
    """Every name that the proto defines, and every attribute of the clients' results."""
    names = set()
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        names |= set(message.fields_by_name)
    return names


@pytest.mark.parametrize("rpc", RPCS)
def test_the_example_of_an_rpc_runs_and_prints_what_it_says(server, rpc):
    [(code, printed)] = EXAMPLE.findall((API / f"{rpc}.md").read_text(encoding="utf-8"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("127.0.0.1:50051", server.target), {})  # noqa: S102 - our own page
    assert out.getvalue() == printed if printed else out.getvalue().strip()


def test_every_rpc_and_page_is_in_the_index():
    index = (API / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in API.glob("*.md")} == {*RPCS, "README", "sampling"}
    assert all(f"]({path.name})" in index for path in API.glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), link
    known = fields() | NOT_FIELDS | {"retry_after_s", "max_retries"}
    assert {name for name in NAME.findall(text) if name not in known} == set()
