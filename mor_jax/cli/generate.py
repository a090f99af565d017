"""`mor generate`: one prompt, one continuation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mor_jax.cli.flags import UsageError
from mor_jax.cli.opening import open_model
from mor_jax.cli.options import GenerateOptions
from mor_jax.data import Tokenization, check_tokens
from mor_jax.evaluation import check_generated, left_padded
from mor_jax.training.distributed import check_same_everywhere


def prompt_tokens(options: GenerateOptions, tokenization: Tokenization) -> list[int]:
    """The prompt in tokens, as a user's message of the chat template with `chat`.

    Raises:
      UsageError: the prompt is empty, or the tokenizer has no chat template.
    """
    if not options.chat:
        tokens = tokenization.encode_prompt(options.prompt)
    elif not tokenization.template:
        raise UsageError(f"--chat: the tokenizer of {options.model} has no chat template; leave --chat out")
    else:
        message = [{"role": "user", "content": options.prompt}]
        tokens = tokenization.encode(tokenization.render(message, add_generation_prompt=True))
    if not tokens:
        raise UsageError("--prompt is empty and the tokenizer adds no start token; give some text")
    return tokens


def generate_command(options: GenerateOptions) -> dict[str, Any]:
    """`text` (what was written after the prompt), `tokens` (how many new ones, the end token included), `token_ids`.

    Raises:
      UsageError: an option is out of range.
      DataError: a token of the prompt is none of the model's.
      NotFiniteError: the model's logits are not finite.
    """
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if options.temperature <= 0:
        raise UsageError(
            f"--temperature must be above 0, got {options.temperature}; use --greedy for the likeliest token"
        )
    if not 0 < options.top_p <= 1:
        raise UsageError(f"--top-p must be in (0, 1], got {options.top_p}")
    model = open_model(options.model, options.dtype, options.mesh, options.base)
    model.require_decoder("mor generate")
    tokenization = model.tokenization(options.chat_date)
    prompt = prompt_tokens(options, tokenization)
    check_tokens(prompt, model.config.vocab_size, "--prompt", tokenization.tokenizer)
    check_same_everywhere({"the prompt in tokens": prompt})
    ends = tokenization.stop
    run = model.generate_fn(
        ends,
        pad_id=ends[0] if ends else 0,
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
    )
    rows = model.padded_rows(1)
    new = run(*left_padded([prompt] * rows, rows, len(prompt)))[0].tolist()
    check_generated(np.array(new), "--prompt")
    stop = next((place for place, token in enumerate(new, 1) if token in ends), len(new))
    text = tokenization.tokenizer.decode(new[:stop], skip_special_tokens=True)
    return {"text": text, "tokens": stop, "token_ids": new[:stop]}
