"""Conversations in the formats of well-known chat models, token by token against the text that each must become.

The formats are written down twice: as a short template, which the tokenizer renders, and as the pieces of text that
their documentation shows, with what the model itself is to say marked by hand.
"""

import copy

import numpy as np
import pytest
from byte_tokenizers import byte_tokenizer

from mor_jax.data import DataError, DataSource, build_row, encode_record, load_examples

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "What is 2 + 2? Not 4\n\n4?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "4, or 2 + 3?"},
    {"role": "assistant", "content": "That is 5 🙂\n\n- of course"},
]

# Llama 3: every turn under a header, closed by <|eot_id|>, which is the end-of-sequence token of the chat models
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# ChatML, as Qwen 2.5 has it: a system turn of its own where there is none
QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma 3: the assistant is called model, the system's words open the user's turn, <eos> is not the end of a turn
GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Mistral: questions in brackets, answers closed by </s>, nothing that announces an answer
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


def llama3(messages):
    yield "<|begin_of_text|>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield f"{message['content']}<|eot_id|>", message["role"] == "assistant"


def qwen(messages):
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou help.<|im_end|>\n", False
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def gemma(messages):
    yield "<bos>", False
    said = ""
    for message in messages:
        if message["role"] == "system":
            said = message["content"] + "\n\n"
        elif message["role"] == "user":
            yield f"<start_of_turn>user\n{said}{message['content']}<end_of_turn>\n", False
            said = ""
        else:
            yield "<start_of_turn>model\n", False
            yield f"{message['content']}<end_of_turn>\n", True


def mistral(messages):
    yield "<s>", False
    for message in messages:
        asked = message["role"] == "user"
        yield f"[INST] {message['content']}[/INST]" if asked else f" {message['content']}</s>", not asked


# name -> (template, pieces, end-of-sequence token, first token, further special tokens)
FORMATS = {
    "llama3": (LLAMA3, llama3, "<|eot_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen": (QWEN, qwen, "<|im_end|>", None, ["<|im_start|>"]),
    "gemma": (GEMMA, gemma, "<eos>", "<bos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, mistral, "</s>", "<s>", ["[INST]", "[/INST]"]),
}
CHATS = {"pair": CHAT[:2], "two": CHAT, "system": [SYSTEM, *CHAT], "system pair": [SYSTEM, *CHAT[:2]]}
CASES = [(name, chat) for name in FORMATS for chat in CHATS if name != "mistral" or "system" not in chat]


def tokenizer_of(name):
    template, _, eos, bos, special = FORMATS[name]
    tokenizer = byte_tokenizer(template, eos, bos)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_only_what_the_assistant_says_is_learned(name, chat):
    tokenizer, messages = tokenizer_of(name), CHATS[chat]
    tokens, learned = [], []
    for text, is_said in FORMATS[name][1](messages):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += own
        learned += [is_said] * len(own)
    found = encode_record({"messages": messages}, tokenizer, "here")
    assert found.tokens.tolist() == tokens
    assert found.learned.tolist() == learned
    assert found.prompt_length == learned.index(True)
    assert tokenizer.convert_tokens_to_ids(FORMATS[name][4][0]) in tokens  # one token, as in the real tokenizers


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_the_merges_of_a_real_tokenizer_change_nothing(smollm2, name, chat):
    """A token of several characters may not carry a part of the question into what is learned, or lose a part."""
    template, pieces, eos, bos, special = FORMATS[name]
    tokenizer, messages = copy.deepcopy(smollm2), CHATS[chat]
    named = {key: token for key, token in (("eos_token", eos), ("bos_token", bos)) if token}
    tokenizer.add_special_tokens({**named, "additional_special_tokens": special})
    tokenizer.chat_template = template
    found = encode_record({"messages": messages}, tokenizer, "here")
    assert tokenizer.decode(found.tokens) == "".join(text for text, _ in pieces(messages))
    borders = np.flatnonzero(np.diff(found.learned.astype(int), prepend=0, append=0))
    runs = [tokenizer.decode(found.tokens[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]
    assert runs == [text for text, is_said in pieces(messages) if is_said]


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_counts_each_learned_token_once_where_it_is_predicted(write_jsonl, name):
    tokenizer = tokenizer_of(name)
    examples = load_examples([DataSource(write_jsonl([{"messages": CHAT}] * 2))], tokenizer, 500)
    row = build_row(examples, np.array([0, 1]), 1000)
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, yes in FORMATS[name][1](CHAT) if yes]
    assert row["targets"][row["loss_mask"] == 1].tolist() == 2 * sum(said, [])
    counted = np.flatnonzero(row["loss_mask"])
    np.testing.assert_array_equal(row["input_ids"][counted + 1], row["targets"][counted])


def test_a_template_that_drops_the_system_message_from_answered_turns_is_named():
    """As that of a Mistral 7B does: it is shown before the last question, and not at all once that is answered."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = byte_tokenizer(template, "</s>", "<s>")
    with pytest.raises(DataError, match=r"here: the chat template rewrites the turns before message 3.*system message"):
        encode_record({"messages": CHATS["system pair"]}, tokenizer, "here")
    assert encode_record({"messages": CHAT}, tokenizer, "here").learned.any()
