"""The benchmark's programs on a tiny shape, and its table."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mor_jax.adapters import METHODS, LoRA, MoR

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmark"


@pytest.fixture(scope="module", autouse=True)
def _scripts_importable():
    """The scripts import one another as they do when run: by name, from their own folder."""
    sys.path.insert(0, str(BENCHMARK))
    yield
    sys.path.remove(str(BENCHMARK))


@pytest.fixture(scope="module")
def bench():
    from programs import SHAPES
    from step_rows import Bench

    return Bench(SHAPES["tiny"], rounds=2)


def test_step_program_trains_the_adapter_alone(bench):
    """The row of C1 times a step that lowers the loss and leaves the base as it was."""
    before = jax.device_get(jax.tree.map(np.array, bench.params))
    program = bench.program("LoRA r16", LoRA(rank=16))
    losses = [float(program.run()["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(bench.params))


def test_benchmark_plan_and_training_take_one_step(bench, monkeypatch, tmp_path):
    """The program of the rows, that of `mor plan` and that of `mor train` are what one `make_step` returns."""
    import programs

    from mor_jax.training import loop, plan, step

    assert programs.make_step is plan.make_step is loop.make_step is step.make_step
    made = []
    monkeypatch.setattr(
        programs, "make_step", lambda *args, **options: made.append(step.make_step(*args, **options)) or made[-1]
    )
    assert bench.step(LoRA(rank=2)).function is made[0].function


def test_floor_program_has_the_loss_of_the_untrained_step(bench):
    floor = float(bench.program("floor").run())
    assert floor == pytest.approx(float(bench.step(LoRA(rank=16)).compile("fresh").run()["loss"]), rel=1e-5)


def test_floor_goes_back_to_the_embedding(bench):
    """Two products of each frozen matrix and six of attention a layer, and two of the head."""
    config, tokens = bench.shape.model, bench.batch["input_ids"].size
    kernels = config.num_layers * (4 * 32 * 32 + 3 * 32 * 48) + 256 * 32
    assert bench.program("floor").counted[0] > 2 * tokens * 2 * kernels


def test_trained_bytes_are_twelve_a_parameter(bench):
    """Row C16: the factors and Adam's two moments in float32, and nothing for the frozen base."""
    from step_rows import bytes_held

    (row,) = bytes_held(bench, ())
    assert row["figure"] == pytest.approx(1.0)


def test_remat_needs_less_memory_and_more_products(bench):
    from step_rows import remat

    rows = list(remat(bench, ()))
    assert [" ".join(own["what"].split()[2:4]) for own in rows] == ["remat dots"] * 2 + ["remat full"] * 2
    dots, full = (float(own["note"].split()[0]) for own in rows[::2])
    assert 1 <= dots < full
    assert rows[3]["figure"] < 1


def test_forms_of_the_mixture_compute_the_same():
    """Row forms: value and gradients of the other forms are those of `MoR.delta`."""
    from form_rows import apart, loop, mixture_inputs, one_product

    adapter, inputs = mixture_inputs(3, 2, 24)
    weights = jax.random.normal(jax.random.key(1), (len(inputs[1]), 24))
    ours, *others = (
        jax.value_and_grad(lambda *own, form=form: (weights * form(adapter, *own)).sum(), argnums=(0, 1, 2))(*inputs)
        for form in (one_product, loop, apart)
    )
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), ours, other)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("method", ["vera", "adalora"])
def test_steps_have_the_losses_of_peft(bench, method):
    """Row C15: five steps of a whole model, the penalty and PEFT's own update of the ranks included."""
    pytest.importorskip("peft", reason="peft is not installed; it is in the extra 'oracle'")
    from torch_rows import CHECKED_STEPS, METHODS, both_programs, total_loss

    (adapter,) = (adapter for adapter in METHODS if adapter.name == method)
    ours, theirs = both_programs(adapter, bench.shape, bench.params, bench.batch)
    losses = np.array([(total_loss(ours.run()), theirs.run()) for _ in range(CHECKED_STEPS)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=0, atol=1e-5)
    assert losses[-1, 0] < losses[0, 0] - 2e-4  # twenty times what they may be apart


def test_methods_are_sized_like_lora(bench):
    """MoR gets the rank whose parameters are nearest to those of LoRA; ranks beside it are further off."""
    from programs import LINEARS, make_plan, sized_adapter

    config = bench.shape.model
    wanted = make_plan(LoRA(rank=16), config).num_params()
    mor = sized_adapter("mor", config)
    off = [abs(make_plan(MoR(rank=mor.rank + step), config).num_params() - wanted) for step in (-1, 0, 1)]
    assert off[1] == min(off)
    assert {site.site.path.rsplit("/", 1)[-1] for site in make_plan(mor, config).sites} == set(LINEARS)
    assert all(sized_adapter(method, config).name == method for method in METHODS)


def row(name, figure, what="a ÷ b", must="<= 1.25", command="first"):
    return {"id": name, "what": what, "must": must, "figure": figure, "command": command, "machine": {"cores": 2}}


@pytest.mark.parametrize(
    ("figure", "products", "end"),
    [
        (1.2, 1.4e9, "1.40 × its matmul FLOPs, 1.25 × its memory traffic"),
        (1.3, 1.4e9, "1.25 × its memory traffic: missed by arithmetic, 1.4 against 1 GFLOP"),
        (1.3, 1.1e9, "1.25 × its memory traffic: missed, and not by its matmuls"),
    ],
)
def test_note_says_whether_the_counted_products_explain_a_miss(figure, products, end):
    from step_rows import counted_note

    method, lora = (SimpleNamespace(counted=counted) for counted in ((products, 5e6), (1e9, 4e6)))
    assert counted_note(row("C6", figure), method, lora).endswith(end)


def test_table_keeps_rows_that_are_not_measured_again(tmp_path):
    from table import merge_rows, read_rows, write_table

    output = tmp_path / "results" / "step_time"
    write_table([row("C1", 1.2), row("C10", 0, "compiled", "<= 0"), row("C2", 0.9, must="<= 0.85")], output)
    write_table(merge_rows(read_rows(output), [row("C1", 1.3, command="second")]), output)
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [(r["id"], r["figure"], r["command"]) for r in rows] == [
        ("C1", 1.3, "second"),
        ("C2", 0.9, "first"),
        ("C10", 0, "first"),
    ]
    text = output.with_suffix(".md").read_text()
    assert "| C1 | a ÷ b | 1.300 |  | <= 1.25 | **no** |  |" in text
    assert "| C10 | compiled | 0.000 |  | <= 0 | yes |  |" in text
    assert "C2, C10: `first`" in text
    assert "C1: `second`" in text


def test_table_tells_each_machine_of_a_command_once_with_its_loads():
    from table import to_markdown

    rows = [row("C1", 1.2), row("C2", 0.9), row("C3", 1.0), row("remat", 1.0), row("C4", 1.0, command="second")]
    machines = [{"cores": 2, "load": 3.1, "jax": "1"}, {"cores": 2, "load": 0.4, "jax": "1"}]
    machines += [{"cores": 1, "load": 2.0, "jax": "1"}, {"cores": 1, "load": 2.0, "jax": "1"}, machines[0]]
    text = to_markdown([own | {"machine": machine} for own, machine in zip(rows, machines, strict=True)])
    assert [line for line in text.splitlines() if line.startswith("on ")] == [
        "on cores 2, load 0.4 to 3.1, jax 1",
        "on cores 1, load 2.0, jax 1",
        "on cores 2, load 3.1, jax 1",
    ]


def test_rows_without_a_number_come_last():
    from table import merge_rows

    names = [own["id"] for own in merge_rows([row("remat", 1.0), row("C10", 0.0)], [row("C2", 0.9)])]
    assert names == ["C2", "C10", "remat"]


@pytest.mark.parametrize(
    ("figure", "must", "met"),
    [
        (1.0, "0.98 to 1.02", True),
        (1.03, "0.98 to 1.02", False),
        (2.4, ">= 2.5", False),
        (2.5, ">= 2.5", True),
        (1e-6, "<= 0.00001", True),
        (9.0, "", None),
    ],
)
def test_figure_is_compared_with_its_target(figure, must, met):
    from table import is_met

    assert is_met(row("C14", figure, must=must)) is met


def test_ratio_alternates_and_warms_up():
    """Two warm-ups of each, then first and second in turn; a function that does more has the larger time."""
    from programs import time_ratio

    calls = []
    work = {"more": 400_000, "less": 40_000}

    def function(name):
        return lambda: calls.append(name) or sum(range(work[name]))

    found = time_ratio(function("more"), function("less"), rounds=3)
    assert calls == ["more", "less"] * 5
    assert found["figure"] > 1
    assert found["low"] <= found["figure"] <= found["high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "C99"], "no row 'C99'"),
        (["--rows", "C12"], "needs --data and --tokenizer"),
        (["--methods", "lora,nothing"], "no method 'nothing'"),
        (["--rounds", "1"], "at least 2"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, message, capsys):
    from step_time import parse

    with pytest.raises(SystemExit):
        parse([*arguments, "--output", "table"])
    assert message in capsys.readouterr().err


def test_slices_are_judged_by_their_rows_and_missing_ones_are_not_yet_run():
    import slice_targets
    import slices

    gib = 2**30
    row = {"fits": True, "gathered_stacks": [], "capacity_bytes": 16 * gib, "argument_bytes": gib, "collectives": {}}
    row |= {"case": "8b", "peak_bytes_per_device": 13.5 * gib, "base_bytes": 1000, "compile_cpu_seconds": 60.0}
    row |= {"compute_seconds": 2.0, "memory_seconds": 1.0, "network_seconds": 0.5, "estimated_seconds": 2.0}
    mor = row | {"method": "mor", "trained_bytes": 42}
    lora = row | {"method": "lora", "trained_bytes": 21, "estimated_seconds": 1.9}
    lines = slice_targets.table([mor, lora]).splitlines()
    assert lines[2].endswith("| 13.50 GiB | yes |")
    assert [line for line in lines if "1.053 | no" in line and line.startswith("| 8B: MoR's estimated time")]
    assert [line for line in lines if "4.20% | no" in line]
    assert sum("not yet run" in line for line in lines) == len(slice_targets.TARGETS) - 3
    whole = slice_targets.table([mor | {"gathered_stacks": ["layers/mlp/up_proj/kernel"]}])
    assert "gathers layers/mlp/up_proj/kernel | no" in whole
    rows = slices.table([mor]).splitlines()
    assert rows[2].startswith("| Llama-3.1-8B | v5e:4x4 | mor | 3 | full | 13.50 | 16 | 1.00 | 2.00 |")
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
    assert "| - |" in rows[2]  # a row of before MFU and commit were written down
    assert rows[2].endswith("| 60 |  |")
    assert "| 57% |" in (later := slices.table([mor | {"mfu": 0.5676, "commit": "abc1234"}]).splitlines()[2])
    assert later.endswith("| 60 | abc1234 |")
    assert sum("not yet run" in line for line in rows) == sum(len(case.methods) for case in slices.CASES.values()) - 1
