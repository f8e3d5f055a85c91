"""The model that ships is the one that was trained, and answers the demo's conversation as transformers does."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vivace import LLM, SamplingParams
from vivace.engine.conversation import ChatMessage, Conversation

NORTHSTAR = Path(__file__).parents[1] / "examples" / "northstar"
MODEL_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def script():
    """The demo's own module: what it says is what is tested."""
    path = NORTHSTAR / "conversation" / "script.py"
    spec = importlib.util.spec_from_file_location("northstar_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MODEL_FILES)
def test_the_model_that_ships_is_unchanged(shared_data, name):
    assert digest(NORTHSTAR / name) == digest(shared_data / "models" / "northstar-dense" / name)


def test_the_functions_stand_as_the_template_would_write_them(script):
    parts = script.conversation()
    by_template = AutoTokenizer.from_pretrained(NORTHSTAR).apply_chat_template(
        [{"role": "system", "content": parts["policy"]}], tools=parts["tools"], tokenize=False
    )
    assert by_template == f"<|im_start|>system\n{script.system_message()}<|im_end|>\n"


def test_the_demos_replies_are_those_of_transformers(script):
    llm = LLM(NORTHSTAR)
    messages = [ChatMessage("system", script.system_message())]
    turns, recorded = script.conversation()["turns"], script.recorded_replies()
    for turn, reply in zip(turns, recorded, strict=True):
        messages.append(ChatMessage("user", turn["user"]))
        text = llm.tokenizer.render_chat(Conversation(messages))
        ids = llm.tokenizer.encode(text, add_special_tokens=False)
        [result] = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0))
        assert list(result.outputs[0].token_ids) == reply["token_ids"]
        assert result.outputs[0].text == reply["text"]
        assert reply["min_margin"] > 1e-3  # or another order of additions could change the reply
        messages.append(ChatMessage("assistant", result.outputs[0].text))
    assert len(recorded) == 5


def test_the_demo_shows_each_kind_of_answer(script):
    replies = [reply["text"] for reply in script.recorded_replies()]
    assert "4-6 days" in replies[0] and "3-5 business days" in replies[1]
    call = replies[3].removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert json.loads(call) == {
        "name": "cancel_order",
        "arguments": {"order_id": "NM-482913"},
    }
    assert "30天" in replies[4]
