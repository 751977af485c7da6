"""Program: what crosses between devices in a train step, compiled for all of them; printed as JSON.

Run by test_hlo.py with XLA_FLAGS=--xla_force_host_platform_device_count=N.
"""

import json
import sys

import jax
import tiny

from cxa_jax.data.fake_xrays import make_fake_dataset
from cxa_jax.hlo import ANALYSIS_ONLY, count_collectives
from cxa_jax.measurements import lower_train_step
from cxa_jax.run import create_run


def main(implementation: str) -> None:
    run = create_run(tiny.make_config(**{"model.implementation": implementation}), make_fake_dataset(tiny.SIZE, 8))
    compiled = lower_train_step(run, 8).compile(ANALYSIS_ONLY)
    state = run.abstract_state
    facts = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for name, tree in {"params": state.params, "statistics": state.batch_stats}.items()
    }
    facts["replicated"] = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(compiled.output_shardings))
    facts["norms"] = len(jax.tree.leaves(state.batch_stats)) // 2
    print(json.dumps({"devices": run.mesh.size, "collectives": count_collectives(compiled.as_text())} | facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
