"""The demo's conversation: what the system message says and what is asked."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent

TOOLS = (
    "\n\n# Tools\n\nYou may call these functions:\n<tools>{tools}\n</tools>\n\nTo call one, reply with:\n"
    '<tool_call>\n{{"name": <name>, "arguments": <arguments>}}\n</tool_call>'
)  # the checkpoint's chat template writes `tools` in these words


def conversation() -> dict[str, Any]:
    """`policy`, `tools` and `turns`, each with what it is about and what the customer says."""
    found: dict[str, Any] = json.loads((HERE / "conversation.json").read_text(encoding="utf-8"))
    return found


def system_message() -> str:
    """The policy, and the functions as text."""
    parts = conversation()
    tools = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in parts["tools"])
    return str(parts["policy"]) + TOOLS.format(tools=tools)


def recorded_replies() -> list[dict[str, Any]]:
    """What `record_replies.py` wrote: `token_ids` and `text` of each turn."""
    found: dict[str, Any] = json.loads((HERE / "replies.json").read_text(encoding="utf-8"))
    return list(found["replies"])
