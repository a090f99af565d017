"""What other software computes from an export, against the live model."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.adapters import DoRA, LoRA, MoR, NotMergeable, RsLoRA, make_adapter
from mor_jax.export import (
    ExportError,
    export_hf,
    export_peft,
    live_logits,
    peft_config,
    probe_tokens,
    read_peft,
    verify,
    verify_export,
    verify_peft,
)
from mor_jax.injection import init_leaves, resolve_sites
from mor_jax.merging import as_lora, merge
from mor_jax.models import Decoder, DecoderConfig, ModelFileError, load_params
from mor_jax.training.integrity import verify_manifest

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 1e-4
CONFIG = DecoderConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2)
EXAMPLE = jax.ShapeDtypeStruct((1, 8), jnp.int32)
MIXED = {  # ranks, scales, a target in one layer only, and a module trained whole
    "overrides": ((r"layers_1/mlp/up_proj", RsLoRA(rank=4, alpha=3.0)), ("k_proj", LoRA(rank=2, alpha=5.0))),
    "trained_modules": ("norm",),
}
CASES = {
    "lora": (LoRA(rank=3, alpha=4.0), ("q_proj", "up_proj"), {}, True),
    "rslora": (RsLoRA(rank=3, alpha=4.0), ("up_proj",), {}, True),
    "dora": (DoRA(rank=3, alpha=4.0), ("q_proj", "down_proj", "lm_head"), {}, True),
    "mixed": (LoRA(rank=3, alpha=4.0), ("q_proj",), MIXED, False),
}


def random_tree(tree, scale, key=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(key)
    noisy = [leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


def make_base(directory, config):
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    params = random_tree(params, 0.1)
    export_hf(params, config, directory)
    return params


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """(params, config, directory) of a base with scanned layers."""
    directory = tmp_path_factory.mktemp("base") / "model"
    return make_base(directory, CONFIG), CONFIG, directory


def adapt(params, config, method, targets, **options):
    plan = resolve_sites(Decoder(config), method, targets, EXAMPLE, **options)
    leaves = init_leaves(jax.random.key(1), plan, params)
    return plan, leaves._replace(params=random_tree(leaves.params, 0.1, key=1))


def torch_model(directory):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)


def torch_logits(model, tokens):
    import torch

    with torch.inference_mode():
        return model(torch.as_tensor(tokens.astype(np.int64))).logits.numpy()


@pytest.mark.oracle
def test_a_sharded_merged_model_computes_the_same_in_transformers(scanned, tmp_path):
    pytest.importorskip("torch")
    params, config, _ = scanned
    plan, leaves = adapt(params, config, DoRA(rank=3), ("q_proj", "up_proj"))
    merged = merge(params, leaves, plan)
    out = export_hf(merged, config, tmp_path / "out", max_shard_bytes=4096)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    tokens = probe_tokens(config)
    adapted, plain = live_logits(params, config, tokens, plan, leaves), live_logits(params, config, tokens)
    assert np.abs(adapted - plain).max() > 1000 * TOLERANCE
    np.testing.assert_allclose(torch_logits(torch_model(out), tokens), adapted, rtol=0, atol=TOLERANCE)
    found = verify_export(out, merged, config)
    assert (found.verified, found.reader) == (True, "transformers")
    assert verify_manifest(out) == []


@pytest.mark.parametrize("reader", ["mor_jax", pytest.param("transformers", marks=pytest.mark.oracle)])
def test_an_export_of_another_model_is_found(scanned, reader):
    if reader == "transformers":
        pytest.importorskip("torch")
    params, config, directory = scanned
    assert verify_export(directory, params, config, reader=reader).verified
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    mlp = {**params["layers"]["mlp"], "up_proj": {"kernel": 1.01 * kernel}}
    other = {**params, "layers": {**params["layers"], "mlp": mlp}}
    found = verify_export(directory, other, config, reader=reader)
    assert not found.verified
    assert found.max_logit_difference > TOLERANCE
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    assert not verify_export(directory, broken, config, reader=reader).verified


def test_the_tolerance_grows_where_a_model_magnifies_rounding():
    """Logits of 1e4 are a thousandth apart in float32 whatever one does; those of 1 are not."""
    plain, gemma = (dataclasses.replace(CONFIG, norm_unit_offset=offset) for offset in (False, True))
    live = lambda params: 1e4 * params["norm"]["scale"]  # noqa: E731
    for scale, apart, verified in ((1.0, 5e-3, True), (1.0, 5e-2, False), (1e-4, 5e-5, True), (1e-4, 5e-4, False)):
        params = {"norm": {"scale": jnp.full((3,), scale)}}
        assert verify._compare(live(params) + apart, live, (params, plain), TOLERANCE, "mor_jax").verified is verified
    broken = verify._compare(live(params) * np.nan, live, (params, plain), TOLERANCE, "mor_jax")
    assert (broken.verified, broken.tolerance) == (False, TOLERANCE)
    params, live = {"norm": {"scale": jnp.zeros((3,))}}, lambda params: 1e4 * (1 + params["norm"]["scale"])
    assert verify._compare(live(params) + 5e-3, live, (params, gemma), TOLERANCE, "mor_jax").verified
    assert not verify._compare(live(params) + 5e-3, live, (params, plain), TOLERANCE, "mor_jax").verified


def test_a_folder_that_is_there_and_another_models_source_are_refused(scanned, tmp_path):
    params, config, directory = scanned
    with pytest.raises(FileExistsError, match="not empty"):
        export_hf(params, config, directory)
    other = dataclasses.replace(config, rope_theta=5e5)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        export_hf(params, other, tmp_path / "out", source_dir=directory)
    assert not (tmp_path / "out").exists()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's use of transformers
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_adapter_on_the_base_with_the_same_logits(scanned, tmp_path, case):
    peft = pytest.importorskip("peft")
    method, targets, options, scan = CASES[case]
    _, config, directory = scanned
    config = dataclasses.replace(config, scan_layers=scan)
    params = load_params(directory, config)
    plan, leaves = adapt(params, config, method, targets, **options)
    out = export_peft(plan, leaves, config, tmp_path / "out", base_model=directory)
    tokens = probe_tokens(config)
    live = live_logits(params, config, tokens, plan, leaves)
    assert np.abs(live - live_logits(params, config, tokens)).max() > 1000 * TOLERANCE
    model = peft.PeftModel.from_pretrained(torch_model(directory), str(out))
    np.testing.assert_allclose(torch_logits(model, tokens), live, rtol=0, atol=TOLERANCE)
    stored = peft.PeftConfig.from_pretrained(str(out))
    assert (stored.use_dora, stored.use_rslora) == (case == "dora", case == "rslora")
    assert stored.base_model_name_or_path == str(directory)
    assert verify_manifest(out) == []


@pytest.mark.parametrize("case", CASES)
def test_a_peft_folder_read_again_holds_the_same_arrays(scanned, tmp_path, case):
    method, targets, options, scan = CASES[case]
    _, config, directory = scanned
    config = dataclasses.replace(config, scan_layers=scan)
    params = load_params(directory, config)
    plan, leaves = adapt(params, config, method, targets, **options)
    out = export_peft(plan, leaves, config, tmp_path / "out")
    again = read_peft(out, config, plan, leaves)
    jax.tree.map(np.testing.assert_array_equal, again.params, leaves.params)


def test_a_peft_folder_has_the_permissions_of_the_users_umask(scanned, tmp_path):
    params, config, _ = scanned
    plan, leaves = adapt(params, config, LoRA(rank=2), ("q_proj",))
    before = os.umask(0o027)
    try:
        out = export_peft(plan, leaves, config, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == dict.fromkeys(
        ("adapter_config.json", "adapter_model.safetensors", "manifest.json"), "0o640"
    )


def test_without_torch_our_own_reader_compares_a_peft_folder(scanned, tmp_path):
    params, config, directory = scanned
    plan, leaves = adapt(params, config, LoRA(rank=2), ("q_proj",))
    out = export_peft(plan, leaves, config, tmp_path / "out")
    found = verify_peft(out, directory, params, config, plan, leaves, reader="mor_jax")
    assert (found.verified, found.reader) == (True, "mor_jax")
    doubled = leaves._replace(params=jax.tree.map(lambda leaf: 2 * leaf, leaves.params))
    assert not verify_peft(out, directory, params, config, plan, doubled, reader="mor_jax").verified


FACTORED = {  # methods whose change is a product of two thin factors, with what decides that
    "mor": {"router": "mean"},
    "reslora": {"form": "block"},
    **{
        name: {}
        for name in ("adalora", "alora", "beamlora", "dylora", "halora", "lora_mini", "melora", "prilora", "vera")
    },
}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", FACTORED)
def test_peft_loads_any_factored_method_as_a_lora(scanned, tmp_path, name):
    pytest.importorskip("peft")
    params, config, directory = scanned
    method = make_adapter(name, rank=4, **FACTORED[name])
    plan, leaves = adapt(params, config, method, ("q_proj", "down_proj"))
    written = as_lora(plan, leaves, params)
    out = export_peft(*written, config, tmp_path / "out", base_model=directory)
    found = verify_peft(out, directory, params, config, plan, leaves, written=written)
    assert (found.verified, found.reader) == (True, "peft")
    tokens = probe_tokens(config)
    live = live_logits(params, config, tokens, plan, leaves)
    assert np.abs(live - live_logits(params, config, tokens)).max() > 100 * TOLERANCE


def test_layers_apart_get_loras_of_their_own_ranks(tmp_path):
    config = dataclasses.replace(CONFIG, scan_layers=False)
    params = make_base(tmp_path / "base", config)
    plan, leaves = adapt(params, config, make_adapter("reslora", rank=2, form="block"), ("q_proj",))
    written, arrays = as_lora(plan, leaves, params)
    assert [site.adapter for site in written.sites] == [LoRA(rank=4, alpha=4.0)] * 2  # its own and the earlier ones
    tokens = probe_tokens(config)
    live = live_logits(params, config, tokens, plan, leaves)
    np.testing.assert_allclose(live_logits(params, config, tokens, written, arrays), live, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", [MoR(rank=2), make_adapter("mora"), make_adapter("reslora", form="middle")])
def test_a_change_that_is_no_product_of_thin_factors_is_no_lora(scanned, method):
    params, config, _ = scanned
    plan, leaves = adapt(params, config, method, ("q_proj",))
    with pytest.raises(NotMergeable, match=r"q_proj: .*no LoRA equals it"):
        as_lora(plan, leaves, params)


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        (MoR(rank=2), {}, "layers/self_attn/q_proj: PEFT has no mor"),
        (LoRA(rank=2), {"overrides": (("up_proj", DoRA(rank=2)),)}, "DoRA at every site"),
        (LoRA(rank=2), {"trained_modules": ("embed_tokens",)}, "output head too"),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_the_format_that_can(tmp_path, method, options, named):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    plan = resolve_sites(Decoder(config), method, ("q_proj",), EXAMPLE, **options)
    with pytest.raises(ExportError, match=named) as caught:
        peft_config(plan, config)
    assert "--format hf" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "named"), [("base", "HERE/base"), ("base/", "HERE/base"), ("~/base", "HERE/base"), ("owner/name", None)]
)
def test_a_folder_is_named_by_its_absolute_path_and_anything_else_as_it_is(monkeypatch, tmp_path, given, named):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = resolve_sites(Decoder(CONFIG), LoRA(rank=2), ("q_proj",), EXAMPLE)
    expected = (named or given).replace("HERE", str(tmp_path))
    assert peft_config(plan, CONFIG, base_model=given)["base_model_name_or_path"] == expected
    assert peft_config(plan, CONFIG, base_model=Path(given))["base_model_name_or_path"] == expected
    assert peft_config(plan, CONFIG)["base_model_name_or_path"] is None


def test_names_are_short_where_every_module_of_a_name_is_adapted():
    loop = dataclasses.replace(CONFIG, scan_layers=False)
    plan = resolve_sites(Decoder(loop), LoRA(rank=2), ("q_proj", r"layers_1/mlp/up_proj"), EXAMPLE)
    described = peft_config(plan, loop)
    assert described["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]
    assert described["rank_pattern"] == {}
    assert json.loads(json.dumps(described)) == described
    assert Path(described["base_model_name_or_path"] or "none").name == "none"
