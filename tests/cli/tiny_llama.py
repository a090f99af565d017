"""A tiny random Llama as a Hugging Face directory, with a tokenizer of bytes, and a few records."""

import json

import jax
import jax.numpy as jnp

from mor_jax.models import Decoder, DecoderConfig
from mor_jax.models.hf import save_params

CONFIG = DecoderConfig(vocab_size=264, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer():
    """One token a byte, `<s>` before a text and `</s>` as its end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {sign: number for number, sign in enumerate(alphabet, 2)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(directory, config=CONFIG):
    """Writes the model and its tokenizer to `directory` and returns it as a string."""
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: 6 * leaf if leaf.ndim > 1 else leaf, params)  # logits worth comparing
    save_params(params, config, directory)
    make_tokenizer().save_pretrained(str(directory))
    return str(directory)


def write_records(path, count=12, task="add"):
    """`count` records of prompt and completion."""
    answers = {"add": lambda n: str(n + 1), "shout": lambda n: "A" * (n % 5 + 1)}
    lines = [json.dumps({"prompt": f"{task} {n}:", "completion": answers[task](n)}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_run(directory, model, method="mor", **fields):
    """A run folder as `mor train` leaves it, its adapter drawn at random instead of trained."""
    import dataclasses

    from mor_jax.injection import init_leaves, resolve_sites
    from mor_jax.models.hf import load_params, read_config
    from mor_jax.training.adapter_file import save_adapter
    from mor_jax.training.checkpoint import fingerprint
    from mor_jax.training.config import TrainConfig, save_config

    directory.mkdir()
    data = (
        f"add={write_records(directory / 'add.jsonl')}",
        f"shout={write_records(directory / 'shout.jsonl', task='shout')}",
    )
    train = TrainConfig(
        model=model, data=data, method=method, rank=4, sequence_length=32, output_dir=str(directory), **fields
    )
    save_config(train, directory / "config.yaml")
    dtypes = {"dtype": train.dtype, "param_dtype": train.param_dtype or train.dtype}
    config = dataclasses.replace(read_config(model), scan_layers=train.scan_layers, **dtypes)
    params = load_params(model, config)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plan = resolve_sites(Decoder(config), train.adapter(), train.targets, example)
    leaves = init_leaves(jax.random.key(1), plan, params)
    noise = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    leaves = leaves._replace(params=jax.tree.map(noise, leaves.params))
    save_adapter(
        directory / "adapter", plan, leaves, {"base_fingerprint": fingerprint(params), "tasks": ["add", "shout"]}
    )
    return str(directory)
