"""`mor eval` on several files: every figure for all, by task, and its mean; what is right transformers says."""

import json

import numpy as np
import pytest
import tiny_bert
import tiny_llama as tiny

from mor_jax.cli.main import main

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.oracle]


def measured(capsys, *words):
    assert main(["eval", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def llama(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def losses(llama, prompt, answer):
    """The negative log-probability of each token of the answer after the prompt, float64."""
    with torch.no_grad():
        logits = llama(torch.tensor([[*prompt, *answer]])).logits[0].double()
    scores = torch.log_softmax(logits, -1)
    return [-float(scores[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)]


def encoded(text, start=True):
    return tiny.make_tokenizer()(text, add_special_tokens=start)["input_ids"]


def test_perplexity_by_task(capsys, tmp_path, model_dir, llama):
    records = {"a": [("x", "yz"), ("xy", "z"), ("y", "zzz")], "b": [("k", "l"), ("kk", "llllll")]}
    files = {
        name: lines(tmp_path / f"{name}.jsonl", [{"prompt": p, "completion": c} for p, c in own])
        for name, own in records.items()
    }
    expected = {
        name: np.concatenate([losses(llama, encoded(p), [*encoded(c, False), 1]) for p, c in own])
        for name, own in records.items()
    }
    result = measured(capsys, model_dir, "--data", files["a"], "--data", f"other={files['b']}", "--batch-size", "2")
    metrics = result["metrics"]
    assert result["data"] == [files["a"], f"other={files['b']}"]
    np.testing.assert_allclose(metrics["loss"], np.concatenate([*expected.values()]).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/a"], expected["a"].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/other"], expected["b"].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity/other"], np.exp(expected["b"].mean()), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_loss"], np.mean([own.mean() for own in expected.values()]), rtol=1e-5)
    perplexities = [np.exp(own.mean()) for own in expected.values()]
    np.testing.assert_allclose(metrics["mean_perplexity"], np.mean(perplexities), rtol=1e-5)
    assert [metrics[f"tokens{end}"] for end in ("", "/a", "/other")] == [
        len(np.concatenate([*expected.values()])),
        9,
        9,
    ]
    assert [metrics[f"examples{end}"] for end in ("", "/a", "/other")] == [5, 3, 2]
    joined = measured(capsys, model_dir, "--data", f"t={files['a']}", f"t={files['b']}")
    assert joined["metrics"].keys() == {"loss", "perplexity", "tokens", "examples", "truncated"}
    np.testing.assert_allclose(joined["metrics"]["loss"], metrics["loss"], rtol=1e-6)
    limited = measured(capsys, model_dir, "--data", files["a"], files["b"], "--limit", "1")["metrics"]
    assert (limited["examples/a"], limited["examples/b"]) == (1, 1)
    first = losses(llama, encoded("k"), [*encoded("l", False), 1])
    np.testing.assert_allclose(limited["loss/b"], np.mean(first), rtol=1e-5)
    alone = measured(capsys, model_dir, "--data", files["a"])
    assert alone["data"] == files["a"]
    np.testing.assert_allclose(alone["metrics"]["loss"], expected["a"].mean(), rtol=1e-5)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_choices_by_task(capsys, tmp_path, model_dir, llama, form):
    """A record's own task stands; the file's is for records without one. An index in a CSV file is an index."""
    options = ["a", "q", "7"]
    best = int(np.argmin([losses(llama, encoded("pick:"), encoded(option, False))[0] for option in options]))
    own = [{"task": "mine", "answer": (best + 1) % 3}, {"answer": best}, {"answer": options[best]}]
    records = [{"prompt": "pick:", "options": options} | record for record in own]
    other = [{"question": "pick:", "choices": options, "answer": best}, records[0] | {"task": "", "answer": 0}]
    if form == "jsonl":
        files = [lines(tmp_path / "one.jsonl", records), lines(tmp_path / "two.jsonl", other)]
    else:
        files = [str(tmp_path / "one.csv"), str(tmp_path / "two.csv")]
        cell = '"' + json.dumps(options).replace('"', '""') + '"'
        rows = [f"pick:,{cell},{record['answer']},{record.get('task', '')}\n" for record in [*records, *other]]
        for file, part in zip(files, (rows[:3], rows[3:]), strict=True):
            with open(file, "w") as written:
                written.write("prompt,options,answer,task\n" + "".join(part))
    metrics = measured(capsys, model_dir, "--data", files[0], "--data", files[1], "--task", "choice")["metrics"]
    last = float(best == 0)
    assert metrics["accuracy/mine"] == 0
    assert metrics["accuracy/one"] == metrics["accuracy_per_token/one"] == 1
    assert metrics["accuracy/two"] == (1 + last) / 2
    assert metrics["accuracy"] == (3 + last) / 5
    assert metrics["mean_accuracy"] == pytest.approx((0 + 1 + (1 + last) / 2) / 3)
    assert metrics["questions/one"] == 2


def test_generation_by_task(capsys, tmp_path, model_dir, llama):
    prompts = ["add 1:", "shout 2:"]
    asked = [torch.tensor([encoded(prompt)]) for prompt in prompts]
    made = [llama.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=1) for ids in asked]
    texts = [
        tiny.make_tokenizer().decode(own[0, ids.shape[1] :], skip_special_tokens=True)
        for own, ids in zip(made, asked, strict=True)
    ]
    right = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
    files = [lines(tmp_path / "a.jsonl", right), lines(tmp_path / "b.jsonl", [{**right[0], "completion": "no"}])]
    words = ("--task", "generation", "--max-new-tokens", "4")
    metrics = measured(capsys, model_dir, "--data", *files, *words)["metrics"]
    assert metrics["accuracy/a"] == 1
    assert metrics["accuracy/b"] == 0
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["mean_accuracy"] == 0.5


def test_classes_by_task(capsys, tmp_path):
    import jax
    import jax.numpy as jnp
    from transformers import AutoModelForSequenceClassification

    from mor_jax.models import Encoder, save_params, with_head

    config = with_head(tiny_bert.CONFIG, ("bad", "good"))
    params = jax.jit(Encoder(config).init)(jax.random.key(3), jnp.ones((1, 4), jnp.int32))["params"]
    save_params(params, config, tmp_path / "model")
    tokenizer = tiny_bert.make_tokenizer()
    tokenizer.save_pretrained(str(tmp_path / "model"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    texts = ["red house", "the boat is big", "small old boat", "blue"]
    with torch.no_grad():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    truth = [answers[0], answers[1], 1 - answers[2], answers[3]]
    records = [{"text": text, "label": label} for text, label in zip(texts, truth, strict=True)]
    one = lines(tmp_path / "one.jsonl", records[:3])
    (tmp_path / "two.csv").write_text(f"text,label\n{texts[3]},{truth[3]}\n")
    files = ("--data", one, "--data", str(tmp_path / "two.csv"), "--task", "classification")
    metrics = measured(capsys, str(tmp_path / "model"), *files)["metrics"]
    assert metrics["accuracy/one"] == pytest.approx(2 / 3)
    assert metrics["accuracy/two"] == 1
    assert metrics["accuracy"] == 0.75
    assert metrics["mean_accuracy"] == pytest.approx(5 / 6)
    assert (metrics["examples/one"], metrics["examples/two"]) == (3, 1)
    assert {"macro_f1/one", "loss/two", "mean_loss"} <= metrics.keys()
    words = ("eval", str(tmp_path / "model"), "--data", f"good={one}", one, "--task", "classification")
    assert "'good' is a task and a class" in refused(capsys, *words)


def test_what_several_files_may_not_be(capsys, tmp_path, model_dir):
    (tmp_path / "other").mkdir()
    file, same = (tiny.write_records(path) for path in (tmp_path / "a.jsonl", tmp_path / "other" / "a.jsonl"))
    assert "the task name 'a' is taken" in refused(capsys, "eval", model_dir, "--data", file, "--data", same)
    assert "leave the weight out" in refused(capsys, "eval", model_dir, "--data", f"{file}:0.5")
    assert "MODEL" in refused(capsys, "eval", "--data", file, same)
    assert "/no/file.jsonl" in refused(capsys, "eval", model_dir, "--data", file, "--data", "/no/file.jsonl")


def test_the_model_may_stand_behind_its_files(capsys, tmp_path, model_dir):
    file, other = tiny.write_records(tmp_path / "a.jsonl"), tiny.write_records(tmp_path / "b.jsonl", task="shout")
    before = measured(capsys, model_dir, "--data", file, other)
    assert measured(capsys, "--data", file, other, model_dir) == before
    assert measured(capsys, "--task", "perplexity", "--data", file, model_dir) == measured(
        capsys, model_dir, "--data", file
    )


def test_a_merge_is_calibrated_on_several_files(capsys, tmp_path, model_dir):
    run = tiny.make_run(tmp_path / "run", model_dir, num_experts=3, targets=("up_proj",))
    parts = [tiny.write_records(tmp_path / f"{task}.jsonl", 8, task) for task in ("add", "shout")]
    words = ["merge", run, "--gates", "mean", "--batches", "2", "--json", "--calibration"]
    assert main([*words, parts[0], "--calibration", f"shout={parts[1]}", "--output-dir", str(tmp_path / "one")]) == 0
    assert main([*words, *parts, "--output-dir", str(tmp_path / "two")]) == 0
    assert main([*words, parts[0], "--output-dir", str(tmp_path / "three")]) == 0
    found = [json.loads(line)["kl"] for line in capsys.readouterr().out.splitlines()]
    assert found[0] == found[1] != found[2]
    unknown = tiny.write_records(tmp_path / "new.jsonl")
    out = str(tmp_path / "four")
    words = ("merge", run, "--gates", "mean", "--calibration", parts[0], unknown, "--output-dir", out)
    assert "the task 'new' is not one of add, shout" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("options", "answer", "index"),
    [
        (["no", "yes"], 1, 1),
        (["no", "yes"], 1.0, 1),  # as pandas writes whole numbers beside missing ones
        (["no", "yes"], "1", 1),
        (["no", "yes"], "1.0", 1),
        (["no", "yes"], "yes", 1),
        (["2", "0"], "0", 1),  # the text of an option comes before an index
        (["2", "0"], 0, 0),
        ([2, 0], "0", 1),
        (["True", "False"], True, 0),
        (["true", "false"], "False", 1),
        (["no", "yes"], True, None),  # not the index 1
        (["no", "yes"], 0.5, None),
        (["no", "yes"], "maybe", None),
        (["no", "yes"], 2, None),
        (["no", "yes"], "-1", None),
        (["no", None], 0, None),
        (["no", {"text": "yes"}], 0, None),
    ],
)
def test_the_right_option(options, answer, index):
    from mor_jax.cli.evaluate import choice_question
    from mor_jax.data import DataError

    record = {"prompt": "a", "options": options, "answer": answer}
    if index is not None:
        assert choice_question(record, tiny.make_tokenizer(), "file:7").answer == index
        return
    with pytest.raises(DataError, match="^file:7: .*(option|answer)"):
        choice_question(record, tiny.make_tokenizer(), "file:7")
