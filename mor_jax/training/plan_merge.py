"""What folding a run's adapters into its base needs on a slice: the programs of `merging.merge`, from shapes alone.

Sites are folded one after the other. The base stays until all are done, so the peak is the base, its adapters, the new
kernels made so far and the temporaries of the site at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from mor_jax.adapters import Leaves, NotMergeable
from mor_jax.injection import get_path
from mor_jax.merging import lower_merge
from mor_jax.models import DecoderConfig
from mor_jax.training.build import widest_mesh
from mor_jax.training.config import TrainConfig
from mor_jax.training.plan import lay_out, local_bytes, needed_bytes
from mor_jax.training.topology import Topology

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MergeForecast:
    """The merge of one plan, on one device.

    Attributes:
      fits: whether the peak is within the capacity.
      peak_bytes_per_device: base, adapters, merged kernels, and temporaries of the site where that is most.
      temporary_bytes: of the site that needs most.
      largest_site: its path.
      problem: one line on why it does not fit, or why there is no merge; "" otherwise.
    """

    fits: bool
    peak_bytes_per_device: int = 0
    temporary_bytes: int = 0
    largest_site: str = ""
    problem: str = ""


def forecast_merge(config: TrainConfig, shape: DecoderConfig, topology: Topology) -> MergeForecast:
    """The merge of a run's base and adapters as `mor merge` lays them out where no mesh is named.

    Gates that read the input are taken as constant; finding good constants costs forward passes beside this.

    Args:
      config: of the run; its mesh does not count.
      shape: of the base, with the run's dtypes.
      topology: of `load_topology`.

    Raises:
      MeshError: the mesh does not fit the slice or the model.
    """
    run = lay_out(config, shape, widest_mesh(shape, topology.devices)[0])
    params, state, constants = run.placed()
    leaves = Leaves(state.adapters, state.adapter_state, constants)
    held = local_bytes((params, leaves))
    held += sum(local_bytes(get_path(params, tuple(path.split("/")))) for path in run.plan.trained_modules)
    made = peak = most = 0
    largest, sizes = "", {}
    try:
        for adapted, lowered in lower_merge(params, leaves, run.plan):
            program = lowered.as_text()
            if program not in sizes:
                memory: Any = lowered.compile().memory_analysis()
                sizes[program] = memory.output_size_in_bytes, memory.temp_size_in_bytes
            output, temporary = sizes[program]
            made += output
            peak = max(peak, held + made + temporary)
            if not largest or temporary > most:
                largest, most = adapted.site.path, temporary
    except NotMergeable as error:
        return MergeForecast(fits=False, problem=str(error))
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error), held + made)
        if needed is None:
            raise
        return MergeForecast(fits=False, peak_bytes_per_device=needed, problem=" ".join(str(error).split())[:300])
    over = peak - topology.capacity_bytes
    needs = f"the merge needs {peak / _GIB:.1f} GiB a device, {over / _GIB:.1f} too many"
    return MergeForecast(
        fits=over <= 0,
        peak_bytes_per_device=peak,
        temporary_bytes=most,
        largest_site=largest,
        problem="" if over <= 0 else f"{needs}: merge on a larger slice, or by `mor merge --mesh` with tensor",
    )
