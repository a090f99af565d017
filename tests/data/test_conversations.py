"""What a conversation says beside its words: tools, calls, which messages are learned, reasoning, nulls of tables."""

import json
import logging

import numpy as np
import pytest
from byte_tokenizers import CHATML, byte_tokenizer

from mor_jax.data import DataError, DataSource, decide_tokens, encode_record, load_examples

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = {"role": "user", "content": "1 + 2?"}
CALLED = [ASKED, {"role": "assistant", "tool_calls": CALL}, {"role": "tool", "content": "3"}]
CHAT = [*CALLED, {"role": "assistant", "content": "three"}]
PAIR = [ASKED, {"role": "assistant", "content": "three"}]


@pytest.fixture(scope="module")
def with_tools():
    return byte_tokenizer(WITH_TOOLS)


def said(tokenizer, record):
    found = encode_record(record, tokenizer, "here")
    edges = np.flatnonzero(np.diff(found.learned.astype(int), prepend=0, append=0))
    return [tokenizer.decode(found.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": ""}])
def test_tools_and_calls_are_shown_and_calls_are_learned(with_tools, as_text, nothing):
    messages = [ASKED, {**CALLED[1], **nothing}, *CHAT[2:]]
    record = {"messages": messages, "tools": json.dumps(TOOLS) if as_text else TOOLS}
    call = json.dumps(CALL)
    found = encode_record(record, with_tools, "here")
    assert with_tools.decode(found.tokens) == (
        f"<|im_start|>tools\n{json.dumps(TOOLS)}<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n"
    )
    assert said(with_tools, record) == [f"{call}<|im_end|>", "three<|im_end|>"]


def test_a_template_of_its_own_for_tools_is_taken():
    tokenizer = byte_tokenizer({"default": CHATML, "tool_use": "{{ strftime_now('%Y') }}" + WITH_TOOLS})
    found = encode_record({"messages": CHAT, "tools": TOOLS}, decide_tokens(tokenizer, chat_date="1999-01-01"), "here")
    assert tokenizer.decode(found.tokens).startswith("1999<|im_start|>tools")
    assert encode_record({"messages": PAIR}, tokenizer, "here").tokens.tolist() == (
        encode_record({"messages": PAIR}, byte_tokenizer(), "here").tokens.tolist()
    )


def test_nulls_of_a_table_are_no_fields(with_tools):
    blank = {"content": None, "tool_calls": None, "name": None}
    row = [{**blank, **message} for message in CHAT]
    row[1]["tool_calls"] = [{"id": None, **CALL[0]}]
    found, wanted = (encode_record({"messages": m, "tools": TOOLS}, with_tools, "x") for m in (row, CHAT))
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert encode_record({"messages": PAIR, "tools": None}, with_tools, "x").tokens.tolist() == (
        encode_record({"messages": PAIR, "tools": []}, with_tools, "x").tokens.tolist()
    )


MASKS = {
    "weight": (0, 1),
    "train": (False, True),
    "training": (False, True),
    "loss": (False, True),
    "masked": (True, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_message_says_whether_it_is_learned(tokenizer, name):
    no, yes = MASKS[name]
    two = [*PAIR, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no more"}]
    learn = lambda first, second: [two[0], two[1] | {name: first}, two[2], two[3] | {name: second}]  # noqa: E731
    plain = encode_record({"messages": two}, tokenizer, "here")
    assert said(tokenizer, {"messages": learn(yes, yes)}) == said(tokenizer, {"messages": two})
    assert said(tokenizer, {"messages": learn(no, yes)}) == ["no more<|im_end|>"]
    found = encode_record({"messages": learn(no, yes)}, tokenizer, "here")
    assert found.tokens.tolist() == plain.tokens.tolist()
    assert found.prompt_length == int(np.argmax(found.learned))
    assert not encode_record({"messages": learn(no, no)}, tokenizer, "here").learned.any()
    user = [two[0] | {name: no}, *two[1:]]
    assert said(tokenizer, {"messages": user}) == said(tokenizer, {"messages": two})


def test_reasoning_that_the_template_cuts_away_is_counted(write_jsonl, caplog):
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = byte_tokenizer(template)
    thought = [ASKED, {"role": "assistant", "content": "<think>so be it</think>three"}]
    found = encode_record({"messages": thought}, tokenizer, "here")
    assert (found.said, found.hidden) == (len("<think>sobeit</think>three"), len("sobeit"))
    assert said(tokenizer, {"messages": thought}) == ["three<|im_end|>"]
    path = write_jsonl([{"messages": thought}, {"messages": PAIR}])
    with caplog.at_level(logging.WARNING):
        assert load_examples([DataSource(path)], tokenizer, 100).counts[0].shortened == 1
    assert f"{path}: 1 of 2 examples: the chat template cuts 6 of 31 characters of the answers away" in caplog.text
    assert encode_record({"messages": thought}, byte_tokenizer(), "here").hidden == 0


def test_reasoning_in_a_field_of_its_own(write_jsonl):
    message = {"role": "assistant", "content": "three", "reasoning_content": "so be it"}
    assert encode_record({"messages": [ASKED, message]}, byte_tokenizer(), "here").hidden == len("sobeit")
    shown = CHATML.replace("m['content']", "(m['reasoning_content'] or '') + m['content']")
    assert said(byte_tokenizer(shown), {"messages": [ASKED, message]}) == ["so be itthree<|im_end|>"]


def test_a_conversation_that_the_assistant_opens(tokenizer):
    messages = [{"role": "assistant", "content": "hello"}, *PAIR]
    assert said(tokenizer, {"messages": messages}) == ["hello<|im_end|>", "three<|im_end|>"]


def test_template_arguments_of_a_record():
    template = "{% if short %}{{ 'briefly\n' }}{% endif %}" + CHATML
    tokenizer = byte_tokenizer(template)
    found = encode_record({"messages": PAIR, "chat_template_kwargs": {"short": True}}, tokenizer, "here")
    assert tokenizer.decode(found.tokens).startswith("briefly\n<|im_start|>user")
    with pytest.raises(DataError, match="here: the chat template does not know 'long'"):
        encode_record({"messages": PAIR, "chat_template_kwargs": {"long": True}}, tokenizer, "here")


def test_instructions_with_a_system_message_and_earlier_turns(tokenizer):
    record = {"instruction": "and?", "output": "no more", "system": "be brief", "history": [["1 + 2?", "three"]]}
    wanted = [{"role": "system", "content": "be brief"}, *PAIR, {"role": "user", "content": "and?"}]
    chat = {"messages": [*wanted, {"role": "assistant", "content": "no more"}]}
    found, other = (encode_record(r, tokenizer, "here") for r in (record, chat))
    assert found.tokens.tolist() == other.tokens.tolist()
    assert found.learned.tolist() == other.learned.tolist()


REFUSED = {
    "tools unseen": ({"messages": PAIR, "tools": TOOLS}, "the chat template does not show 'tools'"),
    "calls unseen": ({"messages": CHAT}, "does not show the calls of message 2"),
    "documents unseen": ({"messages": PAIR, "documents": [{"text": "a"}]}, "does not show 'documents'"),
    "tools are no list": ({"messages": PAIR, "tools": "add"}, "tools is text, but not JSON"),
    "tools of names": ({"messages": PAIR, "tools": ["add"]}, "tools must be a list of objects"),
    "half a weight": ({"messages": [ASKED, PAIR[1] | {"weight": 0.5}]}, "message 2: weight must be 0 or 1"),
    "two words": ({"messages": [ASKED, PAIR[1] | {"weight": 1, "train": False}]}, "weight and train contradict"),
    "learn a user": ({"messages": [ASKED | {"train": True}, PAIR[1]]}, "message 1: train asks to learn what the role"),
    "null and no calls": (
        {"messages": [ASKED, {"role": "assistant", "content": None}]},
        "message 2 must have the text",
    ),
    "tools beside a pair": ({"prompt": "a", "completion": "b", "tools": TOOLS}, "'tools' has no meaning beside"),
    "system beside text": ({"text": "a", "system": "b"}, "'system' has no meaning beside 'text'"),
    "system beside messages": ({"messages": PAIR, "system": "b"}, "'system' has no meaning beside 'messages'"),
    "pictures": ({"messages": PAIR, "images": ["a.png"]}, "'images' has no meaning beside 'messages'"),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, "history must be a list of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(tokenizer, name):
    record, message = REFUSED[name]
    with pytest.raises(DataError, match=f"^file:7: .*{message}"):
        encode_record(record, tokenizer, "file:7")


def test_what_needs_a_template_is_refused_without_one():
    record = {"instruction": "a", "output": "b", "system": "c"}
    with pytest.raises(DataError, match="'system' needs a tokenizer with a chat template"):
        encode_record(record, byte_tokenizer(chat_template=None), "file:7")
    found = encode_record(
        {"prompt": "a", "completion": "b", "tools": [], "system": None}, decide_tokens(byte_tokenizer()), "x"
    )
    assert len(found.tokens) == 3
