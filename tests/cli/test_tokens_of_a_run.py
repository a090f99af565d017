"""What a run decides about tokens is recorded in it, and resuming, evaluating and generating go by that."""

import dataclasses
import json
import shutil

import pytest
import tiny_llama as tiny
import yaml

from mor_jax.cli.generate import prompt_tokens
from mor_jax.cli.main import main
from mor_jax.cli.opening import open_run
from mor_jax.cli.options import GenerateOptions
from mor_jax.data import read_tokenization

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATED = "{{ strftime_now('%Y-%m-%d') }}" + tiny.CHAT_TEMPLATE


@pytest.fixture(scope="module")
def dated(tmp_path_factory, model_dir):
    """The tiny model with a template that prints the date."""
    folder = tmp_path_factory.mktemp("dated") / "model"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    return path


def train(dated, chats, run, *more):
    sizes = (
        "--batch-size",
        "2",
        "--sequence-length",
        "48",
        "--schedule",
        "constant",
        "--method",
        "lora",
        "--rank",
        "2",
    )
    words = ("train", "--model", str(dated), "--data", str(chats), *sizes, "--targets", "up_proj")
    return main([*words, "--output-dir", str(run), *more])


def test_a_run_goes_on_with_the_day_it_began_on(capsys, caplog, dated, chats, tmp_path):
    run = tmp_path / "run"
    assert train(dated, chats, run, "--steps", "2", "--chat-date", "2024-02-29") == 0
    assert f"the chat template of {dated} prints the date: 2024-02-29 for the whole run" in caplog.text
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    tokenizer = tiny.make_tokenizer()
    assert recorded["chat_date"] == "2024-02-29"
    assert recorded["end_tokens"] == recorded["stop_tokens"] == [tokenizer.eos_token_id]
    assert recorded["start_tokens"] == []
    assert train(dated, chats, run, "--steps", "4", "--resume") == 0  # today is another day
    assert yaml.safe_load((run / "config.yaml").read_text())["chat_date"] == "2024-02-29"
    capsys.readouterr()
    assert train(dated, chats, run, "--steps", "6", "--resume", "--chat-date", "2024-03-01") == 2
    assert "chat_date='2024-03-01': the checkpoint was trained with '2024-02-29'" in capsys.readouterr().err
    prompt = prompt_tokens(GenerateOptions(model=str(run), prompt="a", chat=True), open_run(run).tokenization())
    assert tokenizer.decode(prompt) == "2024-02-29<user>a</s><assistant>"


def test_without_a_date_in_the_template_none_is_recorded(model_dir, chats, tmp_path):
    assert train(model_dir, chats, tmp_path / "run", "--steps", "1") == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["chat_date"] == ""


def test_tokens_that_are_given_are_taken_and_kept(dated, chats, tmp_path):
    run = tmp_path / "run"
    given = ("--start-tokens", "7", "--end-tokens", "8,9", "--stop-tokens", "9,3")
    assert train(dated, chats, run, "--steps", "1", *given) == 0
    found = open_run(run).tokenization()
    assert (found.start, found.end, found.stop) == ((7,), (8, 9), (3, 9))
    assert found.encode_text("a") == [7, *tiny.make_tokenizer()("a")["input_ids"], 8, 9]


@pytest.mark.parametrize("day", ["yesterday", "2024-13-01", "20240229"])
def test_a_day_that_is_none_is_refused(capsys, dated, chats, tmp_path, day):
    assert train(dated, chats, tmp_path / "run", "--chat-date", day) == 2
    assert f"chat_date={day!r}: give a day as YYYY-MM-DD" in capsys.readouterr().err


def test_generation_stops_where_training_taught_it_to(capsys, tmp_path, model_dir):
    """The model's files name no end, and the tokenizer adds one to each text: neither may close a prompt."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(folder)
    tokenization = read_tokenization(folder)
    assert tokenization.encode_prompt("a") == tokenizer("a")["input_ids"][:-1]
    assert main(["generate", str(folder), "--prompt", "a", "--greedy", "--max-new-tokens", "4", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    first = whole["token_ids"][0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first]}))
    assert read_tokenization(folder).stop == tuple(sorted({1, first}))
    assert main(["generate", str(folder), "--prompt", "a", "--greedy", "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == [first]
    assert dataclasses.replace(tokenization, stop=()).end == (1,)


@pytest.fixture(scope="module")
def turns(tmp_path_factory, model_dir):
    """The tiny model with a template that ends turns by a token of its own."""
    folder = tmp_path_factory.mktemp("turns") / "model"
    shutil.copytree(model_dir, folder)
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("</s>", "<|end|>")
    tokenizer.save_pretrained(folder)
    return folder, sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"]))


@pytest.mark.parametrize("own", [None, {"eos_token_id": 1, "temperature": 0.5}])
@pytest.mark.parametrize("command", ["merge", "export"])
def test_what_leaves_the_run_says_where_generation_stops(capsys, turns, chats, tmp_path, command, own):
    folder, ends = turns
    (folder / "generation_config.json").unlink(missing_ok=True)
    if own is not None:
        (folder / "generation_config.json").write_text(json.dumps(own))
    assert train(folder, chats, tmp_path / "run", "--steps", "1") == 0
    out = tmp_path / "out"
    assert main([command, str(tmp_path / "run"), "--output-dir", str(out)]) == 0
    written = json.loads((out / "generation_config.json").read_text())
    assert written["eos_token_id"] == ends
    assert written.get("temperature") == (None if own is None else 0.5)
    assert read_tokenization(out).stop == tuple(ends)
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 0


def test_what_the_files_say_already_is_left_as_it_is(model_dir, chats, tmp_path):
    assert train(model_dir, chats, tmp_path / "run", "--steps", "1") == 0
    assert main(["merge", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")]) == 0
    known = json.loads((tmp_path / "out" / "config.json").read_text()).get("eos_token_id")
    there = (tmp_path / "out" / "generation_config.json").is_file()
    assert there == (known != tiny.make_tokenizer().eos_token_id)
