"""What of a record is learned, token by token; the oracle of chats is transformers' own assistant mask."""

import numpy as np
import pytest
from byte_tokenizers import CHATML, byte_tokenizer

from mor_jax.data import DataError, encode_record

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello?"},
    {"role": "assistant", "content": "yes, hello"},
    {"role": "user", "content": "yes, hello"},
    {"role": "assistant", "content": "hello?"},
]
# name -> (template whose assistant turns are marked for transformers, its end-of-sequence token, its first token)
MARKED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        None,
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<head>' + m['role'] + '</head>\n\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<head>assistant</head>\n\n' }}{% endif %}",
        "<|eot|>",
        "<|begin|>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endgeneration %}"
        "{% elif m['role'] == 'system' %}{{ bos_token + '<<SYS>>' + m['content'] + '<</SYS>>' }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
        "</s>",
        "<s>",
    ),
    "gemma": (  # another role's name, and an end of turn that is not the end of the text
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<turn>model\n' }}"
        "{% generation %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endgeneration %}"
        "{% else %}{{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
        "<eos>",
        "<bos>",
    ),
    "default_system": (  # a system turn of the template's own where the conversation has none
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        None,
    ),
    "ends_without_eos": (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + ';\n' }}{% endgeneration %}{% else %}{{ m['content'] + ';\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "</s>",
        None,
    ),
}


def theirs(tokenizer, template, messages):
    found = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], np.array(found["assistant_masks"], bool)


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:3], CHAT[:3], CHAT[1:]], ids=["whole", "pair", "system", "two"])
def test_chat_equals_the_assistant_mask_of_transformers(name, messages):
    template, eos, bos = MARKED[name]
    tokenizer = byte_tokenizer(template, eos, bos)
    ids, mask = theirs(tokenizer, template, messages)
    found = encode_record({"messages": messages}, tokenizer, "here")
    assert found.tokens.tolist() == ids
    np.testing.assert_array_equal(found.learned, mask)
    assert found.prompt_length == int(np.argmax(mask))
    assert found.tokens.dtype == np.int32


@pytest.mark.parametrize(
    "messages", [CHAT, CHAT[1:3], [CHAT[1], {"role": "assistant", "content": "2 + 2 = 4\n\nSo: 4 🙂"}]]
)
def test_smollm2_token_by_token(smollm2, messages):
    def encode(text):
        return smollm2(text, add_special_tokens=False)["input_ids"]

    wanted, learned = [], []
    if messages[0]["role"] != "system":  # the template's own first turn
        wanted += encode("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
        wanted += encode("<|im_end|>\n")
        learned += [False] * len(wanted)
    for message in messages:
        pieces = [(f"<|im_start|>{message['role']}\n", False), (f"{message['content']}<|im_end|>", True), ("\n", False)]
        for text, is_said in pieces:
            wanted += encode(text)
            learned += [is_said and message["role"] == "assistant"] * len(encode(text))
    found = encode_record({"messages": messages}, smollm2, "here")
    assert found.tokens.tolist() == wanted == smollm2.apply_chat_template(messages, return_dict=False)
    assert found.learned.tolist() == learned
    assert smollm2.decode(found.tokens[found.learned]) == "".join(
        f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant"
    )
    prompt = smollm2.apply_chat_template(messages[: [m["role"] for m in messages].index("assistant")], tokenize=False)
    assert smollm2.decode(found.tokens[: found.prompt_length]) == prompt + "<|im_start|>assistant\n"


def test_a_template_that_hides_earlier_thoughts():
    template = (  # a reasoning block is shown in the last turn only, so earlier renderings are no prefixes
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    found = encode_record({"messages": CHAT}, tokenizer, "here")
    assert tokenizer.decode(found.tokens[found.learned]) == "yes, hello<|im_end|><think></think>hello?<|im_end|>"


def test_prompt_and_completion():
    tokenizer = byte_tokenizer(bos="<s>")
    found = encode_record({"prompt": "ab ", "completion": "cd", "other": 3}, tokenizer, "here")
    assert tokenizer.convert_ids_to_tokens(found.tokens.tolist()) == ["a", "b", "Ġ", "c", "d", "<|im_end|>"]
    assert found.learned.tolist() == [False] * 3 + [True] * 3
    assert found.prompt_length == 3


def test_the_real_tokenizer_on_prompt_and_completion(smollm2):
    found = encode_record({"prompt": "The capital of", "completion": " France is Paris."}, smollm2, "here")
    prompt = smollm2("The capital of")["input_ids"]  # the tokens that generation will see
    assert found.tokens.tolist() == [*prompt, *smollm2(" France is Paris.")["input_ids"], smollm2.eos_token_id]
    assert found.learned.tolist() == [place >= len(prompt) for place in range(len(found.tokens))]


def test_a_tokenizer_that_puts_a_first_token():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    names = lambda record: tokenizer.convert_ids_to_tokens(encode_record(record, tokenizer, "x").tokens.tolist())  # noqa: E731
    assert names({"text": "ab"}) == ["<s>", "a", "b", "</s>"]
    assert names({"prompt": "a", "completion": "b"}) == ["<s>", "a", "b", "</s>"]
    chat = encode_record({"messages": CHAT[1:3]}, tokenizer, "x").tokens  # a template writes its own, or none
    assert tokenizer.bos_token_id not in chat


def test_plain_text(tokenizer):
    found = encode_record({"text": "abc"}, tokenizer, "here")
    assert tokenizer.decode(found.tokens) == "abc<|im_end|>"
    assert found.learned.all()
    assert found.prompt_length == 0


def test_instructions(tokenizer):
    record = {"instruction": "add", "input": "1 2", "output": "3"}
    as_chat = [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    found, wanted = (encode_record(r, tokenizer, "here") for r in (record, {"messages": as_chat}))
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.learned.tolist() == wanted.learned.tolist()
    plain = byte_tokenizer(chat_template=None)
    for extra, middle in (({"input": "1 2"}, "### Input:\n1 2\n\n"), ({"input": ""}, ""), ({}, "")):
        found = encode_record({"instruction": "add", "output": "3", **extra}, plain, "here")
        text = f"### Instruction:\nadd\n\n{middle}### Response:\n3<|im_end|>"
        assert plain.decode(found.tokens) == text
        assert plain.decode(found.tokens[found.learned]) == "3<|im_end|>"


REFUSED = {
    "no known field": ({"question": "a"}, "has the fields question; needs one of: messages"),
    "no field": ({}, "has the fields \\(none\\)"),
    "half": ({"prompt": "a"}, "has the fields prompt"),
    "number": ({"prompt": "a", "completion": 3}, "'completion' must be text, found int"),
    "null": ({"text": None}, "'text' must be text, found NoneType"),
    "surrogate": ({"text": "a\ud83d"}, "the field 'text': character 2 is half of a broken pair"),
    "chat surrogate": ({"messages": [{"role": "assistant", "content": "\udc00"}]}, "message 1: character 1 is half"),
    "messages text": ({"messages": "hi"}, "messages must be a list"),
    "messages empty": ({"messages": []}, "messages must be a list"),
    "message text": ({"messages": ["hi"]}, "message 1 must have the text fields"),
    "no content": ({"messages": [*CHAT, {"role": "user"}]}, "message 6 must have the text fields"),
    "pictures": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 must have the text"),
    "no assistant": ({"messages": CHAT[:2]}, "no message has the role 'assistant'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_records_are_errors_with_their_place(tokenizer, name):
    record, message = REFUSED[name]
    with pytest.raises(DataError, match=f"^file:7: .*{message}"):
        encode_record(record, tokenizer, "file:7")


def test_templates_that_cannot_serve():
    with pytest.raises(DataError, match="file:7: the tokenizer has no chat template"):
        encode_record({"messages": CHAT}, byte_tokenizer(chat_template=None), "file:7")
    picky = byte_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    with pytest.raises(DataError, match="file:7: the chat template refuses the messages \\(no system\\)"):
        encode_record({"messages": CHAT}, picky, "file:7")
    counting = byte_tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(DataError, match="file:7: the chat template rewrites the turns before message 3"):
        encode_record({"messages": CHAT}, counting, "file:7")
