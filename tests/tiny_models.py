"""Tiny random checkpoints with a byte-level tokenizer, made by transformers: what tests run on."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

BEGIN, END, TURN, PAD = "<|begin|>", "<|end|>", "<|turn|>", "<|pad|>"
VOCAB_SIZE = 260  # 256 bytes, then the four above
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
STD = 0.1  # of every weight: large enough that a mistake shows in the logits
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 259,
    "tie_word_embeddings": False,
}


def make_checkpoint(
    directory: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    chat_template: str | None = CHAT_TEMPLATE,
    **config_overrides: Any,
) -> Path:
    """Write a random model of `kind` (transformers' `model_type`) and its tokenizer; returns
    `directory`.

    `config_overrides` are fields of the transformers config. Norm weights are random too.
    """
    fields = SHAPE | config_overrides
    if fields["head_dim"] is None:  # not every config has one
        del fields["head_dim"]
    config = CONFIG_MAPPING[kind](**fields)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, STD, generator=generator)
            if "norm" in name:
                parameter += 1
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    make_tokenizer(directory, chat_template)
    return directory


def make_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a tokenizer whose first 256 tokens are the bytes."""
    vocab = {character: i for i, character in enumerate(bytes_to_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = (BEGIN, END, TURN, PAD)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def bytes_to_characters() -> list[str]:
    """The character that stands for each byte, in GPT-2's way."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
