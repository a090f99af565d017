"""Where texts begin and end, where an answer begins, and what ends generation: against tokenizers' own words."""

import json
import os
from pathlib import Path

import pytest
from byte_tokenizers import CHATML, byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from mor_jax.data import DataError, as_tokenization, decide_tokens, encode_record, read_tokenization

MODELS = Path(os.environ.get("MOR_MODELS", Path.home() / ".cache/mor_jax/models"))
SENTENCE = 'Lily  and Tom were unhappy: "I won\'t", she said.\n\n2+2==4 é🙂'


@pytest.fixture(scope="module", params=["stories260k", "smollm2", "minilm"])
def real(request):
    """A tokenizer of each family: SentencePiece with a blank before a text, byte-level BPE, WordPiece."""
    if not (MODELS / request.param / "tokenizer.json").exists():
        pytest.skip(f"the real models are not on this machine: no {request.param} in {MODELS}")
    return AutoTokenizer.from_pretrained(MODELS / request.param)


@pytest.fixture(scope="module")
def stories():
    if not (MODELS / "stories260k" / "tokenizer.json").exists():
        pytest.skip(f"the real models are not on this machine: no stories260k in {MODELS}")
    return AutoTokenizer.from_pretrained(MODELS / "stories260k")


def with_affixes(before="", after="", **options):
    tokenizer = byte_tokenizer(**options)
    names = [name for name in (before, after) if name]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *names]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(filter(None, (before, "$A", after))),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    return tokenizer


def test_a_completion_is_tokenised_behind_its_prompt(stories):
    record = {"prompt": "Lily and Tom were", "completion": " playing in the park."}
    found = encode_record(record, stories, "here")
    assert found.tokens.tolist() == [*stories("Lily and Tom were playing in the park.")["input_ids"], 2]
    assert found.tokens[: found.prompt_length].tolist() == stories("Lily and Tom were")["input_ids"]


def test_at_every_border_the_prompt_is_what_generation_sees(real):
    kept = 0
    whole = real(SENTENCE, add_special_tokens=False)["input_ids"]
    start = as_tokenization(real).start
    for border in range(len(SENTENCE)):
        prompt, completion = SENTENCE[:border], SENTENCE[border:]
        found = encode_record({"prompt": prompt, "completion": completion}, real, "here")
        own = real(prompt, add_special_tokens=False)["input_ids"]
        tokens = found.tokens.tolist()
        assert tokens[: found.prompt_length] == [*start, *own], border
        body = tokens[len(start) : len(tokens) - len(as_tokenization(real).end)]
        if whole[: len(own)] == own:
            kept += 1
            assert body == whole, border
        if real.unk_token != "[UNK]":  # a word piece within a word may begin a new one
            assert real.decode(body) == real.decode(whole), border
    assert len(SENTENCE) > kept > len(SENTENCE) // 3  # both cases of the rule were met


BLANKS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NARROW = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CLOSED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n '").replace(
    "'\n' + m['content']", "'\n ' + m['content']"
)
ASKED = [{"role": "user", "content": "Who was there?"}]


@pytest.mark.parametrize("template", [BLANKS, NARROW, CLOSED], ids=["blank", "no blank", "blank behind a line break"])
@pytest.mark.parametrize("answer", ["Lily and Tom.", " Lily", "\n\nTom"])
def test_an_answer_begins_where_the_generation_prompt_ends(real, template, answer):
    options = {"chat_template": template, "tokenize": False}
    prompt = real.apply_chat_template(ASKED, add_generation_prompt=True, **options)
    messages = [*ASKED, {"role": "assistant", "content": answer}]
    whole = real.apply_chat_template(messages, **options)
    found = encode_record({"messages": messages}, with_template(real, template), "here")
    assert found.tokens[: found.prompt_length].tolist() == real(prompt, add_special_tokens=False)["input_ids"]
    assert found.learned.tolist() == [place >= found.prompt_length for place in range(len(found.learned))] or (
        whole.endswith("<|im_end|>\n") and not found.learned[-1]
    )
    if real.unk_token != "[UNK]":
        assert real.decode(found.tokens) == real.decode(real(whole, add_special_tokens=False)["input_ids"])


def with_template(tokenizer, template):
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    changed.chat_template = template
    return changed


def test_the_second_answer_of_a_conversation_begins_there_too(real):
    messages = [*ASKED, {"role": "assistant", "content": "Lily."}, *ASKED, {"role": "assistant", "content": "Tom."}]
    tokenizer = with_template(real, BLANKS)
    found = encode_record({"messages": messages}, tokenizer, "here")
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    second = real(prompt, add_special_tokens=False)["input_ids"]
    first = found.tokens.tolist().index(second[-1])
    runs = [place for place in range(1, len(found.learned)) if found.learned[place] and not found.learned[place - 1]]
    assert len(runs) == 2
    assert runs[0] == found.prompt_length
    behind = real(" Tom.\n", add_special_tokens=False)["input_ids"]
    assert real.decode(found.tokens[runs[1] :]).split() == real.decode(behind).split()
    assert first < runs[1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<s>Once upon a time</s>", "<s>Once upon a time</s>"),
        ("Once upon a time", "<s>Once upon a time</s>"),
        ("<s>Once upon a time", "<s>Once upon a time</s>"),
        ("Once</s> upon", "<s>Once</s> upon</s>"),
    ],
)
def test_a_text_that_says_where_it_begins_and_ends_is_taken_at_its_word(stories, text, wanted):
    ids = stories(wanted, add_special_tokens=False)["input_ids"]
    assert encode_record({"text": text}, stories, "here").tokens.tolist() == ids
    assert (
        as_tokenization(stories).encode_prompt("<s>Once") == stories("<s>Once", add_special_tokens=False)["input_ids"]
    )
    pair = encode_record({"prompt": "<s>Once", "completion": " upon</s>"}, stories, "here")
    assert pair.tokens.tolist() == stories("<s>Once upon</s>", add_special_tokens=False)["input_ids"]


def names(tokenizer, record):
    return tokenizer.convert_ids_to_tokens(encode_record(record, tokenizer, "here").tokens.tolist())


def test_what_the_tokenizer_adds_itself_opens_and_closes():
    both = with_affixes("<b>", "<e>", eos="<e>")
    assert names(both, {"text": "ab"}) == ["<b>", "a", "b", "<e>"]
    assert names(both, {"prompt": "a", "completion": "b"}) == ["<b>", "a", "b", "<e>"]
    assert both.convert_ids_to_tokens(as_tokenization(both).encode_prompt("a")) == ["<b>", "a"]  # not closed
    other = with_affixes(after="<sep>", eos="<e>")
    assert names(other, {"text": "ab"}) == ["a", "b", "<sep>", "<e>"]
    assert as_tokenization(other).stop == tuple(sorted(other.convert_tokens_to_ids(["<sep>", "<e>"])))
    assert names(with_affixes(after="<sep>", eos=None), {"text": "ab"}) == ["a", "b", "<sep>"]


def test_the_model_says_what_ends_a_text_where_the_tokenizer_does_not(tmp_path):
    tokenizer = byte_tokenizer(chat_template=None, eos=None)
    tokenizer.save_pretrained(tmp_path)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": start}))
    assert read_tokenization(tmp_path).end == (start,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start, 7]}))
    found = read_tokenization(tmp_path)
    assert (found.end, found.stop) == ((start,), (7, start))
    assert encode_record({"text": "a"}, found, "here").tokens.tolist()[-1] == start
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 10**6}))  # beyond the vocabulary
    assert read_tokenization(tmp_path).end == ()
    assert read_tokenization(tmp_path, end=(9,), stop=(9, 3)).stop == (3, 9)


def test_the_end_of_a_turn_stops_generation_beside_the_end_of_the_text():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template, eos="<eos>", bos="<bos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert as_tokenization(tokenizer).stop == tuple(sorted(ends))
    assert as_tokenization(tokenizer).end == (ends[0],)
    assert as_tokenization(byte_tokenizer()).stop == (byte_tokenizer().eos_token_id,)


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML


def test_the_date_of_a_run_is_the_date_of_its_template():
    tokenizer = byte_tokenizer(DATED)
    record = {"messages": [*ASKED, {"role": "assistant", "content": "Tom."}]}
    texts = []
    for day in ("2024-02-29", "2026-12-01"):
        found = encode_record(record, decide_tokens(tokenizer, chat_date=day), "here")
        texts.append(tokenizer.decode(found.tokens))
    written = [text.partition("\n")[0] for text in texts]
    assert written == ["Today: 29 Feb 2024", "Today: 01 Dec 2026"]


def test_a_template_that_draws_lots_is_refused():
    with pytest.raises(DataError, match="its chat template writes the same conversation otherwise each time"):
        decide_tokens(byte_tokenizer("{{ range(1000) | random }}" + CHATML))


@pytest.mark.oracle
@pytest.mark.parametrize("prompt", ["Lily and Tom were", "Answer: ", "2+2=", "<s>Once", "  "])
def test_choices_are_cut_as_the_evaluation_harness_cuts_them(real, prompt):
    harness = pytest.importorskip("lm_eval.api.model")

    start = as_tokenization(real).start

    class Harness(harness.TemplateLM):
        backend, eot_token_id, prefix_token_id = "causal", None, None

        def tok_encode(self, string, add_special_tokens=None, **_):
            tokens = real(string, add_special_tokens=False)["input_ids"]
            return tokens if tuple(tokens[: len(start)]) == start else [*start, *tokens]  # as with a text's own <s>

        def _loglikelihood_tokens(self, requests, **_):
            return [tuple(map(tuple, request[1:])) for request in requests]

        def loglikelihood_rolling(self, requests, **_):
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    for option in (" playing", "playing", "=4", "\nTom", "é"):
        wanted = Harness._encode_pair(Harness(), prompt, option) if prompt.strip() else None
        before, own = as_tokenization(real).encode_choice(prompt, option)
        if wanted is None:  # the harness asks its caller to put a start token there
            assert before == list(as_tokenization(real).start or as_tokenization(real).end[:1])
            assert own == real(prompt + option, add_special_tokens=False)["input_ids"]
        else:
            assert (before, own) == wanted
