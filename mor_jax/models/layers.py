"""What decoder and encoder share beside attention: activations and what the backward pass may keep."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax

ACTIVATION_FUNCTIONS = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
