"""Writes replies.json: what Hugging Face transformers answers to the demo's conversation, greedily, in fp32.

    .venv/bin/python examples/northstar/conversation/record_replies.py

Needs the test environment (`make setup`). The demo and the tests compare Vivace's replies with it, token for token.
"""

import json

import script
import torch
import transformers

MAX_TOKENS = 96


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], end: set[int]) -> tuple[list[int], float]:
    """The best token at a time, the end token included, and the smallest lead of a best over a second logprob."""
    made: list[int] = []
    margin = float("inf")
    while len(made) < MAX_TOKENS and (not made or made[-1] not in end):
        best = model(torch.tensor([ids + made])).logits[0, -1].log_softmax(-1).topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        made.append(int(best.indices[0]))
    return made, margin


def main() -> None:
    """Play the conversation with the model's own replies as its history."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(script.MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(script.MODEL, dtype=torch.float32)
    parts = script.conversation()
    by_template = tokenizer.apply_chat_template(
        [{"role": "system", "content": parts["policy"]}], tools=parts["tools"], tokenize=False
    )
    assert script.system_message() in by_template, (
        "the tools are not written as the template has them"
    )
    messages = [{"role": "system", "content": script.system_message()}]
    replies = []
    for turn in parts["turns"]:
        messages.append({"role": "user", "content": turn["user"]})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        made, margin = greedy(model.eval(), list(ids), set(model.generation_config.eos_token_id))
        text = tokenizer.decode(made, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        replies.append({"text": text, "token_ids": made, "min_margin": round(margin, 4)})
        print(f"{turn['user']}\n  {text}   ({len(made)} tokens, smallest margin {margin:.3f})")
    record = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "replies": replies,
    }
    path = script.HERE / "replies.json"
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
