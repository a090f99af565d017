"""Gradients of every parameter equal torch's, whatever the layers are stacked by and the backward pass recomputes."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, make_pair

from mor_jax.adapters import AdapterInputs
from mor_jax.models import Decoder, abstract_params, head_kernel, load_params
from mor_jax.training.step import language_model_loss

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 12))


@pytest.fixture(scope="module", params=["qwen3_mixed_window"])
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def torch_gradients(pair, tmp_path_factory):
    """The gradients of the mean next-token loss, saved as if they were weights."""
    from safetensors.torch import save_file

    ids = torch.tensor(IDS)
    logits = pair.torch_model(ids).logits[:, :-1].reshape(-1, VOCAB)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1)).backward()
    folder = tmp_path_factory.mktemp("torch_gradients")
    shutil.copy(pair.directory / "config.json", folder)
    save_file({name: p.grad for name, p in pair.torch_model.named_parameters()}, folder / "model.safetensors")
    return folder


class Bare(Decoder):
    """A decoder without adapters, called as one with them."""

    def apply(self, *args, adapter_inputs, **kwargs):
        return super().apply(*args, **kwargs)


@pytest.mark.parametrize("pair", ["gemma2", "gemma3_eight_layers"], indirect=True, scope="module")
def test_the_loss_of_training_and_its_gradients_equal_torch(pair, torch_gradients):
    """Soft caps, norms on both sides, windows that alternate and tied embeddings, through the loss of training."""
    config = replace(pair.config, scan_layers=True)
    batch = {
        "input_ids": jnp.asarray(IDS[:, :-1]),
        "targets": jnp.asarray(IDS[:, 1:]),
        "positions": jnp.broadcast_to(jnp.arange(IDS.shape[1] - 1), IDS[:, 1:].shape),
        "segment_ids": jnp.ones(IDS[:, 1:].shape, jnp.int32),
        "loss_mask": jnp.ones(IDS[:, 1:].shape, jnp.int32),
    }
    with torch.no_grad():
        logits = pair.torch_model(torch.tensor(IDS)).logits[:, :-1].reshape(-1, VOCAB)
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS)[:, 1:].reshape(-1)).item()
    cap = config.logit_softcap
    chunked = language_model_loss(Bare(config), lambda p: head_kernel(p, config), 5, cap)
    params = load_params(pair.directory, config)
    total, count = jax.jit(lambda params: chunked({"params": params}, batch, AdapterInputs()))(params)
    np.testing.assert_allclose(total / count, wanted, rtol=1e-5)

    whole = language_model_loss(Bare(config))  # the chunked loss has a frozen head
    gradient = jax.jit(jax.grad(lambda params: whole({"params": params}, batch, AdapterInputs())[0] / count))
    assert_close(gradient(params), load_params(torch_gradients, config))


def assert_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, value), wanted in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(wanted).max() > 1e-4, path
        np.testing.assert_allclose(value, wanted, atol=1e-5, rtol=1e-3, err_msg=str(path))


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "none"), (True, "dots"), (False, "full")])
def test_gradients_equal_torch(pair, torch_gradients, scan_layers, remat):
    config = replace(pair.config, scan_layers=scan_layers, remat=remat)

    @jax.jit
    @jax.grad
    def gradient(params):
        log_probabilities = jax.nn.log_softmax(Decoder(config).apply({"params": params}, jnp.asarray(IDS))[:, :-1])
        return -jnp.take_along_axis(log_probabilities, jnp.asarray(IDS)[:, 1:, None], axis=-1).mean()

    assert_close(gradient(load_params(pair.directory, config)), load_params(torch_gradients, config))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_keeps_less_for_the_backward_pass(pair, scan_layers):
    ids = jnp.zeros((2, 64), jnp.int32)

    def kept(remat):
        config = replace(pair.config, scan_layers=scan_layers, remat=remat)
        forward = lambda params: Decoder(config).apply({"params": params}, ids)  # noqa: E731
        backward = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], abstract_params(config))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept("full") < 0.6 * kept("dots") < 0.6 * kept("none")
