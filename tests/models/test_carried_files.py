"""Which files of a base an export takes with it: those that transformers' tokenizers read, and no other."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from mor_jax.models import Decoder, DecoderConfig, ModelFileError, carried_files, save_params
from mor_jax.models.carried_files import CARRIED

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = DecoderConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json", "tokenizer.4.0.0.json"),
    *("additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"),
)
LEFT = (
    *("chat_template_backup_secret.txt", "chat_template.jinja.bak", "tokenizer.json.orig", "tokenizer_notes.md"),
    *("vocab.txt~", "vocab.secret", "tokenizer.5.json", "tokenizer.backup.json", "tokenization_own.py", "README.md"),
    *(".env", "pytorch_model.bin", "preprocessor_config.json", "processor_config.json", "sentence_bert_config.json"),
    *("additional_chat_templates/notes.txt", "additional_chat_templates/deeper/old.jinja", "1_Pooling/config.json"),
)
WEIGHTS = {"config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def params():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]


@pytest.fixture
def base(params, tmp_path):
    save_params(params, CONFIG, tmp_path / "base")
    return tmp_path / "base"


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {name}")


def listed(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def save(params, base, out):
    save_params(params, CONFIG, out, base)
    return listed(out)


def test_an_exact_list_of_files_is_copied(params, base, tmp_path):
    write(base, (*KEPT, *LEFT))
    versions = {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json", "tokenizer.backup.json", "../x", 3]}
    (base / "tokenizer_config.json").write_text(json.dumps(versions))
    assert save(params, base, tmp_path / "out") == {*KEPT, *WEIGHTS}
    for name in KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


READERS = ("Llama", "CodeLlama", "Qwen2", "Gemma", "GPT2", "Bert", "BertJapanese", "Bertweet", "Herbert", "Roberta")


def test_the_list_has_every_file_that_a_tokenizer_of_a_known_family_reads():
    import transformers
    from transformers import tokenization_utils_base

    for name in READERS:
        read = set(getattr(transformers, f"{name}Tokenizer").vocab_files_names.values())
        assert read
        assert read <= set(CARRIED), name
    common = {value for name, value in vars(tokenization_utils_base).items() if name.endswith("_FILE")}
    assert "tokenizer_config.json" in common
    assert common <= set(CARRIED)


def test_templates_beside_the_default_survive(params, base, tmp_path):
    """transformers saves each named template as a file of its own, and finds them all in the export."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(str(base))
    assert (base / "additional_chat_templates" / "rag.jinja").is_file()
    save(params, base, tmp_path / "out")
    shutil.rmtree(base)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def outside(base):
    secret = base.parent / "secret.txt"
    secret.write_text("the secret")
    return secret


def link_out(base):
    (base / "vocab.txt").symlink_to(outside(base))


def link_out_relatively(base):
    outside(base)
    (base / "tokenizer.model").symlink_to("../secret.txt")


def link_by_way_of_a_link(base):
    (base / "inner").symlink_to(outside(base))
    (base / "chat_template.jinja").symlink_to("inner")


def link_of_a_template(base):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").symlink_to(outside(base))


def link_of_the_folder_of_templates(base):
    (base.parent / "elsewhere").mkdir()
    (base.parent / "elsewhere" / "rag.jinja").write_text("the secret")
    (base / "additional_chat_templates").symlink_to(base.parent / "elsewhere")


def device(base):
    (base / "generation_config.json").symlink_to("/dev/zero")


def pipe(base):
    os.mkfifo(base / "merges.txt")


def folder(base):
    (base / "added_tokens.json").mkdir()


def nowhere(base):
    (base / "special_tokens_map.json").symlink_to("gone.json")


def circle(base):
    (base / "tokenizer.json").symlink_to("tokenizer.json")


def no_folder(base):
    (base / "additional_chat_templates").write_text("x")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (link_out, "vocab.txt: leads out of"),
        (link_out_relatively, "tokenizer.model: leads out of"),
        (link_by_way_of_a_link, "chat_template.jinja: leads out of"),
        (link_of_a_template, "rag.jinja: leads out of"),
        (link_of_the_folder_of_templates, "rag.jinja: leads out of"),
        (device, "generation_config.json: leads out of"),
        (pipe, "merges.txt: is no regular file"),
        (folder, "added_tokens.json: is no regular file"),
        (nowhere, "special_tokens_map.json: a link that leads nowhere"),
        (circle, "tokenizer.json: a link that leads nowhere"),
        (no_folder, "additional_chat_templates: must be a folder"),
    ],
)
def test_what_is_no_file_of_the_folder_is_refused_before_anything_is_written(params, base, tmp_path, spoil, named):
    spoil(base)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ModelFileError, match=named) as caught:
        save(params, base, tmp_path / "out")
    assert "the secret" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_links_within_the_folder_and_to_the_folder_are_followed(params, base, tmp_path):
    (base / "original").mkdir()
    write(base, ["original/tokenizer.model"])
    (base / "tokenizer.model").symlink_to("original/tokenizer.model")
    (tmp_path / "latest").symlink_to(base)
    assert save(params, tmp_path / "latest", tmp_path / "out") == {"tokenizer.model", *WEIGHTS}
    assert not (tmp_path / "out" / "tokenizer.model").is_symlink()


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_cache_of_the_hub_is_a_folder_of_links_to_its_blobs(params, base, tmp_path, inside):
    """The layout of huggingface_hub: snapshots/REVISION/FILE -> ../../blobs/HASH."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc" / inside
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(base, ["tokenizer.json", "additional_chat_templates/rag.jinja"])
    for number, name in enumerate(sorted(listed(base))):
        (base / name).rename(repository / "blobs" / f"{number:040x}")
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / f"{number:040x}", (snapshot / name).parent))
    expected = {"tokenizer.json", "additional_chat_templates/rag.jinja", *WEIGHTS}
    assert save(params, snapshot, tmp_path / "out") == expected
    assert all(not (tmp_path / "out" / name).is_symlink() for name in expected)
    other = tmp_path / "hub" / "models--owner--other" / "blobs"
    write(other, ["aa"])
    (snapshot / "vocab.txt").symlink_to(other / "aa")
    with pytest.raises(ModelFileError, match=r"vocab.txt: leads out of .*models--owner--name and is not copied"):
        carried_files(snapshot)
