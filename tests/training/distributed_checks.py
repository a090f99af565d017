"""What each of two processes finds out about itself; run by test_distributed.py. Prints one JSON line."""

import argparse
import json

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax import processes
from mor_jax.models import hf
from mor_jax.training import distributed
from mor_jax.training.build import build_run
from mor_jax.training.checkpoint import fingerprint
from mor_jax.training.config import load_config
from mor_jax.training.mesh import put_batch


def batch_hashes(run, count=3):
    """Hashes of the next global batches as they lie on the devices, whatever the mesh and the number of hosts."""
    batches = [put_batch(next(run.batches), run.mesh, run.config.batch_size) for _ in range(count)]
    return [fingerprint(batch) for batch in batches]


def _outcome(function):
    try:
        return function()
    except Exception as error:
        return [type(error).__name__, str(error), error.exit_code]


def _fail():
    raise distributed.DistributedError("only process 0 can know")


def _read_elements():
    """Counts the elements that `load_params` reads of each tensor, into the dict that is returned."""
    read, original = {}, hf._read

    def counting(source, entry, dtype, index):
        value = original(source, entry, dtype, index)
        places = read.setdefault(entry.name, {})
        places[str(index)] = value.size  # the same place again is one that two devices of this process hold
        return value

    hf._read = counting
    return read


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    assert distributed.join(args.coordinator, args.num_processes, args.process_id)
    with distributed.together():
        read = _read_elements()
        run = build_run(load_config(args.config))
        signals = distributed.Pulse(run.mesh)
        sharded = jax.device_put(jax.numpy.arange(16.0), NamedSharding(run.mesh, PartitionSpec("fsdp")))
        batch = put_batch(next(run.batches), run.mesh, run.config.batch_size)
        own = 15 if args.process_id == 1 else None
        found = {
            "devices": [jax.local_device_count(), jax.device_count()],
            "first": processes.is_first(),
            "decided": distributed.first_decides(lambda: {"number": args.process_id}),
            "failed": _outcome(lambda: distributed.first_decides(_fail)),
            "same": _outcome(lambda: distributed.check_same_everywhere({"seed": 1})),
            "other": _outcome(lambda: distributed.check_same_everywhere({"seed": 1, "steps": args.process_id})),
            "gathered": processes.gathered({"x": sharded})["x"].tolist(),
            "pulse": {name: int(value) for name, value in signals(own, batch).items()},
            "base": fingerprint(run.params),
            "hashes": batch_hashes(run),
            "read": {name: sum(places.values()) for name, places in read.items()},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
