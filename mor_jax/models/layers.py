"""What decoder and encoder share beside attention: activations and what the backward pass may keep.

It keeps all (none), products with weights (dots), each layer's input (full), or that input in the host's memory
(offload; decoders on a TPU or GPU). Whatever else it needs it computes again, but for the few numbers a token that
decide an adapter's gate where a layer is widest (full).
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax

from mor_jax.adapters import GATED_PRODUCT

ACTIVATION_FUNCTIONS = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
LAYER_INPUT = "layer_input"  # the name under which a decoder's layer declares its input
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.save_only_these_names(GATED_PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
