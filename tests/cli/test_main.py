"""The command's face: exit codes, one line on stderr, one JSON value on stdout, and what needs no trained model."""

import json
import subprocess
import sys

import pytest

from mor_jax.cli import main as cli
from mor_jax.cli.main import COMMANDS, NOT_BUILT, exit_code, main, plain
from mor_jax.training.integrity import write_manifest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@pytest.fixture
def lone_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def run_json(capsys, *words):
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def run_bad(capsys, *words):
    """The one line that a bad command prints; stdout stays empty and the exit code is 2."""
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from mor_jax.cli.main import main; main(['--help']); print({'jax', 'flax'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", NOT_BUILT)
def test_a_command_that_is_not_built_says_so(capsys, name):
    assert "not built yet" in run_bad(capsys, name, "anything", "--flag")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], "trian"),
        (["train", "--stps", "1"], "--stps"),
        (["eval", "somewhere"], "--data"),
        (["methods", "extra"], "extra"),
        (["verify", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, words, named):
    assert named in run_bad(capsys, *words)


def test_methods_lists_the_registry(capsys):
    from mor_jax.adapters import METHODS

    code, entries, _ = run_json(capsys, "methods")
    assert code == 0
    assert [entry["name"] for entry in entries] == list(METHODS)
    assert all(set(e) == {"name", "title", "paper", "routing", "rule", "merge", "parameters"} for e in entries)
    assert all(entry["title"] and entry["paper"] for entry in entries)
    rules = {entry["name"]: entry["rule"] for entry in entries if entry["rule"] != "none"}
    assert rules == {
        "mora": "none; fold (reset_every)",
        "halora": "noise",
        "dylora": "rank draw",
        "prilora": "pruning",
        "adalora": "budget",
        "alora": "reallocation",
        "beamlora": "expansion",
    }
    merges = {entry["name"]: entry["merge"] for entry in entries if entry["merge"] != "exact"}
    assert merges == {
        "mor": "approximate: distill, least_squares, sequential, mean, task:NAME",
        "halora": "only with mergeable=true",
    }


def test_methods_for_people_is_a_table(capsys):
    from mor_jax.adapters import METHODS

    assert main(["methods"]) == 0
    first_cells = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell for cell in first_cells if cell] == list(METHODS)


@pytest.mark.parametrize(("method", "rank"), [("vera", 256), ("halora", 4), ("mor", 8)])
def test_without_a_rank_the_method_has_its_own(capsys, lone_config, method, rank):
    for flags, expected in ((), rank), (("--rank", "3"), 3):
        _, result, _ = run_json(capsys, "inspect", lone_config, "--method", method, "--targets", "q_proj", *flags)
        assert [site["rank"] for site in result["sites"]] == [expected]
    assert (result["mergeable"], result["sites"][0]["mergeable"]) == {
        "vera": ("exact", "exact"),
        "halora": ("only with mergeable=true", "only with mergeable=true"),
        "mor": ("approximate: distill, least_squares, sequential, mean, task:NAME", "approximate"),
    }[method]


def test_inspect_counts_a_seven_billion_model_from_its_config_alone(capsys, lone_config):
    flags = ["--method", "lora", "--rank", "16", "--targets", "q_proj,up_proj"]
    code, result, _ = run_json(capsys, "inspect", lone_config, *flags)
    assert code == 0
    assert result["trainable_parameters"] == 32 * 16 * ((4096 + 4096) + (4096 + 11008))
    assert result["frozen_parameters"] == 6_738_415_616  # as the model's card counts them
    sites = {site["path"]: site for site in result["sites"]}
    assert sites["layers/mlp/up_proj"]["kernel"] == [4096, 11008]
    assert all(site["mergeable"] == "exact" and site["layers"] == 32 for site in sites.values())


def test_inspect_takes_the_config_file_itself_and_a_known_name(capsys, lone_config):
    flags = ["--method", "lora", "--rank", "16", "--targets", "q_proj"]
    _, of_folder, _ = run_json(capsys, "inspect", lone_config, *flags)
    code, of_file, _ = run_json(capsys, "inspect", f"{lone_config}/config.json", *flags)
    assert code == 0
    assert of_file["sites"] == of_folder["sites"]
    code, named, _ = run_json(capsys, "inspect", "Llama-3.1-8B", *flags)
    assert code == 0
    assert named["trainable_parameters"] == 32 * 16 * (4096 + 4096)
    assert named["frozen_parameters"] == 8_030_261_248  # as the model's card counts them
    assert "did you mean llama-3.1-8b" in run_bad(capsys, "inspect", "Llama-3.1-8")


def test_inspect_of_loop_layers_counts_the_same(capsys, lone_config):
    _, scanned, _ = run_json(capsys, "inspect", lone_config)
    _, looped, _ = run_json(capsys, "inspect", lone_config, "--no-scan-layers")
    assert len(looped["sites"]) == 32 * len(scanned["sites"])
    assert looped["trainable_parameters"] == scanned["trainable_parameters"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--targets", "q_prj"], "q_proj"),
        (["--method", "moor"], "did you mean 'mor'"),
        (["--rank", "0"], "rank"),
        (["--options", "ruoter=mean"], "router"),
    ],
)
def test_inspect_names_what_is_wrong(capsys, lone_config, flags, named):
    assert named in run_bad(capsys, "inspect", lone_config, *flags)


def test_verify_finds_a_flipped_byte(capsys, tmp_path):
    (tmp_path / "weights").write_bytes(bytes(100))
    write_manifest(tmp_path)
    code, result, _ = run_json(capsys, "verify", str(tmp_path))
    assert (code, result["ok"], result["bad"]) == (0, True, [])
    (tmp_path / "weights").write_bytes(bytes(50) + b"\x01" + bytes(49))
    code, result, error = run_json(capsys, "verify", str(tmp_path))
    assert (code, result["ok"], result["bad"]) == (3, False, ["weights"])
    assert error.count("\n") == 1


def test_verify_of_a_run_folder_looks_at_all_that_was_saved(capsys, tmp_path):
    for name in ("adapter", "checkpoints/2", "checkpoints/bad/1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "data").write_bytes(b"x")
    write_manifest(tmp_path / "adapter")
    code, result, _ = run_json(capsys, "verify", str(tmp_path))
    assert (code, result["bad"]) == (3, ["checkpoints/2/manifest.json"])  # an unfinished checkpoint has none
    write_manifest(tmp_path / "checkpoints/2")
    assert run_json(capsys, "verify", str(tmp_path))[0] == 0


def test_exit_codes_tell_input_from_faults():
    from mor_jax.models.config import DecoderConfig
    from mor_jax.training.config import ConfigError

    def raised(function):
        try:
            function()
        except Exception as error:
            return exit_code(error)

    def config_error():
        raise ConfigError("x")

    assert raised(config_error) == 2
    shape = {"hidden_size": 4, "intermediate_size": 4, "num_layers": 1, "num_heads": 1}
    assert raised(lambda: DecoderConfig(vocab_size=0, **shape)) == 2  # our check
    assert raised(lambda: int("x")) == 3  # somebody else's ValueError is our fault
    assert raised(lambda: 1 / 0) == 3


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (OSError("disk full"), 3)]
)
def test_interruptions_and_faults(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    monkeypatch.setitem(COMMANDS, "methods", cli.Command(fail, COMMANDS["methods"].options, (), (), ""))
    assert main(["methods"]) == code


def test_what_a_command_prints_never_reaches_the_json(monkeypatch, capsys):
    def noisy(args):
        print("progress")
        return {"loss": float("nan")}

    monkeypatch.setitem(COMMANDS, "methods", cli.Command(noisy, COMMANDS["methods"].options, (), (), ""))
    assert main(["methods", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"loss": None}
    assert "progress" in captured.err


def test_plain_turns_arrays_into_lists():
    import numpy as np

    assert plain({"a": np.float32(0.5), "b": np.arange(2), "c": (1, None)}) == {"a": 0.5, "b": [0, 1], "c": [1, None]}


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["train", "--model", "A", "--model", "B"], "--model"),
        (["train", "--rank", "8", "--rank", "16"], "--rank"),
        (["train", "--resume", "--no-resume"], "--no-resume"),
        (["eval", "M", "--data", "x", "--task", "choice", "--task", "perplexity"], "--task"),
        (["generate", "M", "--prompt", "a", "--prompt", "b"], "--prompt"),
        (["merge", "R", "--output-dir", "a", "--output-dir", "b"], "--output-dir"),
        (["export", "R", "--output-dir", "a", "--format", "hf", "--format", "peft"], "--format"),
        (["inspect", "M", "--method", "lora", "--method", "mor"], "--method"),
        (["plan", "M", "--topology", "cpu:1", "--topology", "cpu:2"], "--topology"),
        (["demo", "--seed", "1", "--seed", "2"], "--seed"),
        (["generate", "M", "--prompt", "a", "--num-processes", "1", "--num-processes", "2"], "--num-processes"),
    ],
)
def test_a_second_value_of_a_flag_is_refused_by_every_command(capsys, words, flag):
    error = run_bad(capsys, *words)
    assert f"{flag} is given twice" in error
