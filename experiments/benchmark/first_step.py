"""One step of LoRA in a fresh process, for row C9: its time is that of imports, compilation and the step.

python experiments/benchmark/first_step.py SHAPE CACHE_FOLDER
"""

import sys

import jax
from programs import SHAPES, adapter_program, make_batch, make_params

from mor_jax.adapters import LoRA
from mor_jax.training.build import use_compile_cache

if __name__ == "__main__":
    shape = SHAPES[sys.argv[1]]
    use_compile_cache(sys.argv[2])
    params = make_params(shape)
    jax.block_until_ready(adapter_program("LoRA r16", LoRA(rank=16), shape.model, params, make_batch(shape)).run())
