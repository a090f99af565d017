"""The demo's data, base and measures, and what its committed figures must show; CI runs the demo itself."""

import json
import string
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters.registry import make_adapter
from mor_jax.cli.demo import measure, run
from mor_jax.cli.demo.tasks import LENGTHS, TASKS, make_strings, write_tasks
from mor_jax.cli.opening import open_model
from mor_jax.data import load_tokenizer, read_tokenization
from mor_jax.injection import resolve_sites
from mor_jax.models import Decoder
from tests.models.continuations import continue_prompts

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@pytest.fixture(scope="module")
def base():
    return open_model(run.BASE)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(run.BASE)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_hand(task, text):
    """The answers once more, letter by letter."""
    numbers = [string.ascii_lowercase.index(letter) for letter in text]
    if task == "sort":
        numbers = np.sort(numbers)
    if task == "reverse":
        numbers = [numbers[-1 - place] for place in range(len(numbers))]
    if task == "shift":
        numbers = [(number + 1) % 26 for number in numbers]
    if task == "double":
        numbers = np.repeat(numbers, 2)
    if task == "skip":
        numbers = [number for place, number in enumerate(numbers) if place % 2 == 0]
    return "".join(chr(97 + number) for number in numbers)


def test_no_string_is_in_two_parts_and_each_is_asked_in_every_task(tmp_path):
    files = write_tasks(tmp_path, {"train": 40, "held_out": 20}, seed=3)
    strings = {}
    for part, by_task in files.items():
        asked = [{record["prompt"].partition(":")[2] for record in read(path)} for path in by_task.values()]
        assert all(one == asked[0] for one in asked)
        strings[part] = asked[0]
    assert len(strings["train"]) == 40
    assert len(strings["held_out"]) == 20
    assert not strings["train"] & strings["held_out"]


def test_answers_are_right(tmp_path):
    files = write_tasks(tmp_path, {"train": 40}, seed=3)["train"]
    assert len(files) == 5
    for task, path in files.items():
        for record in read(path):
            name, _, text = record["prompt"].partition(":")
            assert name == task == record["task"]
            assert text.endswith("=")
            assert record["completion"] == by_hand(task, text[:-1])


def test_one_seed_gives_one_set_of_strings():
    assert make_strings(50, 1) == make_strings(50, 1)
    assert make_strings(50, 1) != make_strings(50, 2)
    assert {len(text) for text in make_strings(50, 1)} == set(LENGTHS)


def test_lora_and_mor_have_equally_many_parameters(base):
    shape = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    sizes = {
        name: resolve_sites(Decoder(base.config), make_adapter(name, **options), "all-linear", shape).num_params()
        for name, options in run.METHODS.items()
    }
    assert abs(sizes["mor"] / sizes["lora"] - 1) <= 0.02


def test_the_base_is_small_and_its_tokenizer_gives_each_letter_and_task_one_token(base, tokenizer):
    assert (run.BASE / "model.safetensors").stat().st_size < 4_000_000
    for task in TASKS:
        text = f"{task}:bkdz="
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 7
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == base.config.vocab_size
    assert read_tokenization(run.BASE).stop == (tokenizer.eos_token_id,)


@pytest.mark.oracle
def test_transformers_reads_the_base_and_computes_its_logits(base):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run.BASE, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 24))
    with torch.no_grad():
        expected = model(torch.as_tensor(tokens)).logits.numpy()
    found = Decoder(base.config).apply({"params": base.params}, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_answer_is_right_where_greedy_generation_writes_it(base, tokenizer, tmp_path):
    texts = make_strings(12, 5)
    records = [{"prompt": f"copy:{text}=", "completion": text if n % 3 else text[::-1]} for n, text in enumerate(texts)]
    path = tmp_path / "copy.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = measure.read_rows({"copy": path}, tokenizer)
    right = measure.answers_right(measure.Forward(base.config).logits(base.variables, rows), rows)
    prompts = [own[mask > 0].tolist() for own, mask in zip(rows["input_ids"], rows["prompt_mask"], strict=True)]
    written = continue_prompts(
        Decoder(base.config),
        base.config,
        base.variables,
        prompts,
        max_new_tokens=10,
        eos_ids=read_tokenization(run.BASE).stop,
    )
    answers = [own[mask > 0].tolist() for own, mask in zip(rows["targets"], rows["loss_mask"], strict=True)]
    assert right.tolist() == [one == answer for one, answer in zip(written, answers, strict=True)]
    assert 0 < right.sum() < len(right)


def test_expert_use_that_follows_the_task_is_told_from_one_that_does_not():
    rows = np.repeat(np.arange(4), 20)
    follows = {"site": np.eye(4)[rows][:, None, :]}  # each task has an expert of its own
    figures, by_task, _ = measure.expert_use(follows, rows, 4, seed=0)
    np.testing.assert_array_equal(by_task["site"][:, 0], np.eye(4))
    assert figures["by_task"] == pytest.approx(0.75)  # |1 - 1/4| and three times |0 - 1/4|, halved
    assert figures["p_value"] == pytest.approx(1 / (1 + measure.SHUFFLES))
    alike = {"site": np.full((80, 1, 4), 0.25)}
    figures, _, _ = measure.expert_use(alike, rows, 4, seed=0)
    assert figures["by_task"] == 0
    assert figures["p_value"] == 1


@pytest.fixture(scope="module")
def table():
    return json.loads((RESULTS / "demo.json").read_text())


def test_the_committed_table_is_of_the_present_settings(table):
    assert len(table["seeds"]) == 3
    assert table["settings"]["steps"] == run.STEPS
    assert table["settings"]["strings"] == run.STRINGS
    assert table["settings"]["methods"] == run.METHODS
    assert table["settings"]["learning_rates"] == run.LEARNING_RATES


def test_the_untuned_base_is_far_below_and_nobody_is_near_the_ceiling(table):
    for seed in table["seeds"]:
        for method in run.METHODS:
            mean = seed["methods"][method]["accuracy"]["mean"]
            assert seed["base_accuracy"]["mean"] <= mean - 0.10
            assert mean < 0.98


def test_routing_does_something_in_the_committed_table(table):
    for seed in table["seeds"]:
        assert seed["merges"]["mean"]["kl"] > 0.01
        assert seed["routing"]["by_task"] > seed["routing"]["shuffled_max"]
        assert seed["export_verified"]


def test_learning_rates_are_the_best_of_the_committed_grid():
    rows = json.loads((RESULTS / "demo_grid.json").read_text())["rows"]
    rates = {name: {row["learning_rate"] for row in rows if row["method"] == name} for name in run.METHODS}
    assert rates["lora"] == rates["mor"]
    for name, rate in run.LEARNING_RATES.items():
        own = {row["learning_rate"]: row["accuracy"]["mean"] for row in rows if row["method"] == name}
        assert own[rate] == max(own.values())


def test_the_readme_quotes_the_committed_table(table):
    readme = (RESULTS.parents[1] / "README.md").read_text()
    for method in run.METHODS:
        means = [100 * seed["methods"][method]["accuracy"]["mean"] for seed in table["seeds"]]
        assert f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f} %" in readme
    for merge in ("mean", "sequential"):
        assert f"{100 * np.mean([seed['merges'][merge]['accuracy'] for seed in table['seeds']]):.1f} %" in readme
    assert table["verdicts"]["mean"] == "tie"  # the README's word
