"""`mor eval` and `mor generate` on a plain Hugging Face directory, against values computed here."""

import json

import numpy as np
import pytest
import tiny_llama as tiny

from mor_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run_json(capsys, *words):
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def run_bad(capsys, *words):
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def logits(model_dir):
    """Tokens -> next-token log-probabilities (S, V) in float64, one unpadded sequence at a time."""
    import jax

    from mor_jax.models import Decoder
    from mor_jax.models.hf import load_params, read_config

    config = read_config(model_dir)
    variables = {"params": load_params(model_dir, config)}
    forward = jax.jit(Decoder(config).apply)  # causal: what fills the row up to 32 changes nothing before it

    def run(tokens):
        row = np.array([[*tokens, *[0] * (32 - len(tokens))]], np.int32)
        out = np.asarray(forward(variables, row))[0, : len(tokens)].astype(np.float64)
        return out - np.log(np.exp(out).sum(-1, keepdims=True))

    return run


def test_perplexity_is_the_mean_over_completion_tokens(capsys, tmp_path, model_dir, logits):
    data = tiny.write_records(tmp_path / "held_out.jsonl", count=5)
    metrics = run_json(capsys, "eval", model_dir, "--data", data)["metrics"]
    tokenizer, losses = tiny.make_tokenizer(), []
    for n in range(5):
        prompt = tokenizer(f"add {n}:")["input_ids"]
        answer = [*tokenizer(str(n + 1), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        scores = logits([*prompt, *answer])
        losses += [-scores[len(prompt) - 1 + place, token] for place, token in enumerate(answer)]
    assert metrics["tokens"] == len(losses)
    assert metrics["examples"] == 5
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(np.mean(losses)), rtol=1e-5)


def test_limit_and_batch_size_change_only_what_they_say(capsys, tmp_path, model_dir):
    data = tiny.write_records(tmp_path / "held_out.jsonl", count=5)
    whole = run_json(capsys, "eval", model_dir, "--data", data, "--batch-size", "5")["metrics"]
    split = run_json(capsys, "eval", model_dir, "--data", data, "--batch-size", "2")["metrics"]
    np.testing.assert_allclose(whole["loss"], split["loss"], rtol=1e-6)
    assert run_json(capsys, "eval", model_dir, "--data", data, "--limit", "3")["metrics"]["examples"] == 3


def test_choice_takes_the_likeliest_option(capsys, tmp_path, model_dir, logits):
    tokenizer = tiny.make_tokenizer()
    prompt, options = "pick:", ["a", "zq", "7"]
    scores = []
    for option in options:
        tokens = tokenizer(option, add_special_tokens=False)["input_ids"]
        start = tokenizer(prompt)["input_ids"]
        out = logits([*start, *tokens])
        scores.append(sum(out[len(start) - 1 + place, token] for place, token in enumerate(tokens)))
    best = int(np.argmax(scores))
    records = [{"prompt": prompt, "options": options, "answer": best, "task": "right"}]
    records += [{"question": prompt, "choices": options, "answer": options[(best + 1) % 3], "task": "wrong"}]
    path = tmp_path / "choice.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    metrics = run_json(capsys, "eval", model_dir, "--data", str(path), "--task", "choice")["metrics"]
    assert metrics["accuracy"] == 0.5
    assert (metrics["accuracy/right"], metrics["accuracy/wrong"]) == (1.0, 0.0)


def test_greedy_generation_follows_the_likeliest_tokens(capsys, model_dir, logits):
    result = run_json(capsys, "generate", model_dir, "--prompt", "add 1:", "--max-new-tokens", "6", "--greedy")
    tokenizer = tiny.make_tokenizer()
    tokens = list(tokenizer("add 1:")["input_ids"])
    start = len(tokens)
    while len(tokens) < start + 6 and (len(tokens) == start or tokens[-1] != tokenizer.eos_token_id):
        tokens.append(int(np.argmax(logits(tokens)[-1])))
    assert result["tokens"] == len(tokens) - start
    assert result["text"] == tokenizer.decode(tokens[start:], skip_special_tokens=True)


def test_generation_by_exact_match(capsys, tmp_path, model_dir):
    words = ("--max-new-tokens", "4", "--greedy")
    text = run_json(capsys, "generate", model_dir, "--prompt", "add 1:", *words)["text"]
    records = [{"prompt": "add 1:", "completion": text}, {"prompt": "add 1:", "completion": text + "x"}]
    path = tmp_path / "generation.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    flags = ["--task", "generation", "--max-new-tokens", "4"]
    assert run_json(capsys, "eval", model_dir, "--data", str(path), *flags)["metrics"]["accuracy"] == 0.5


def test_sampling_follows_its_seed(capsys, model_dir):
    words = ("generate", model_dir, "--prompt", "x", "--max-new-tokens", "12", "--seed")
    texts = [run_json(capsys, *words, seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_chat_uses_the_template(capsys, model_dir):
    plain = run_json(capsys, "generate", model_dir, "--prompt", "<user>hi</s><assistant>", "--greedy")
    chat = run_json(capsys, "generate", model_dir, "--prompt", "hi", "--chat", "--greedy")
    assert chat == plain


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "--top-p"),
        (["generate", "/no/folder", "--prompt", "x"], "/no/folder"),
        (["eval", "MODEL", "--data", "/no/file.jsonl"], "/no/file.jsonl"),
        (["eval", "MODEL", "--data", "BAD"], "bad.jsonl:2"),
        (["eval", "MODEL", "--data", "BAD", "--task", "choice"], "options"),
        (["eval", "MODEL", "--data", "BAD", "--task", "classification"], "no classification head"),
        (
            ["eval", "MODEL", "--data", "HALF_PROMPT", "--task", "choice"],
            "prompt.jsonl:1: the prompt: character 2",
        ),
        (["eval", "MODEL", "--data", "HALF_OPTION", "--task", "choice"], "option.jsonl:1: option 2: character 1"),
        (["eval", "MODEL", "--data", "BAD", "--limit", "-1"], "--limit must be at least 0"),
        (["merge", "MODEL", "--output-dir", "OUT"], "config.yaml"),
        (["export", "MODEL", "--output-dir", "OUT"], "config.yaml"),
    ],
)
def test_bad_input_is_named(capsys, tmp_path, model_dir, words, named):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    out = tmp_path / "out"
    places = {"MODEL": model_dir, "BAD": str(bad), "OUT": str(out)}
    for name, prompt, option in (("half_prompt", "a\ud83d", "c"), ("half_option", "a", "\ud83d")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "options": ["b", option], "answer": 0}))
        places[name.upper()] = str(path)
    assert named in run_bad(capsys, *(places.get(word, word) for word in words))
    assert not out.exists()


def test_a_directory_without_a_tokenizer_is_bad_input(capsys, tmp_path, model_dir):
    from pathlib import Path

    data, out = tiny.write_records(tmp_path / "data.jsonl"), tmp_path / "run"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(model_dir) / name).read_bytes())
    said = f"{tmp_path}: no readable tokenizer"
    assert said in run_bad(capsys, "generate", str(tmp_path), "--prompt", "x")
    assert said in run_bad(capsys, "train", "--model", str(tmp_path), "--data", data, "--output-dir", str(out))
    assert not out.exists()


def test_a_directory_without_weights_is_bad_input(capsys, tmp_path, model_dir):
    from pathlib import Path

    (tmp_path / "config.json").write_text((Path(model_dir) / "config.json").read_text())
    assert "safetensors" in run_bad(capsys, "generate", str(tmp_path), "--prompt", "x")
