"""A tiny random BERT as a Hugging Face directory, with a tokenizer of whole words, and labelled pairs of sentences."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.models import Encoder, EncoderConfig, save_params

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["red", "blue", "green", "the", "house", "boat", "is", "big", "small", "old"]
CONFIG = EncoderConfig(
    vocab_size=len(MARKS + WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    max_position_embeddings=32,
    initializer_range=0.3,
)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(MARKS + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("input_ids", "token_type_ids", "attention_mask")
    marks = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), MARKS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=list(names), **marks)


def make_model(directory, config=CONFIG):
    """Writes a bare encoder and its tokenizer to `directory` and returns it as a string."""
    params = jax.jit(Encoder(config).init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    save_params(params, config, directory)
    make_tokenizer().save_pretrained(str(directory))
    return str(directory)


def write_pairs(path, count, seed):
    """Pairs whose label says which of the two sentences has the house in it; the other has the boat."""
    rng = np.random.default_rng(seed)

    def sentence(noun):
        return " ".join([*rng.choice(WORDS[:4], rng.integers(1, 4)), noun, *rng.choice(WORDS[6:], 2)])

    lines = []
    for number in range(count):
        nouns = ("house", "boat") if number % 2 else ("boat", "house")
        record = dict(zip(("sentence1", "sentence2"), map(sentence, nouns), strict=True))
        lines.append(json.dumps({**record, "label": "first" if number % 2 else "second"}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
