"""One of several processes that decode together: two_processes.py PORT PROCESS PROCESSES OUT.

Each has 4 / PROCESSES CPU devices of a mesh of 2 by 2: pages over the one axis, heads over the
other. Process 0 writes the results and what the mesh was to OUT.
"""

import sys

import jax

PORT, PROCESS, PROCESSES, OUT = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // int(PROCESSES))
if int(PROCESSES) > 1:
    jax.distributed.initialize(f"localhost:{PORT}", int(PROCESSES), int(PROCESS))

import cases  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from sharded import Split, run, split_pages  # noqa: E402

LENGTHS = [130, 3, 0, 256]
inputs = cases.make_inputs(cases.Case(4, 4, 0, 4), lengths=LENGTHS, max_blocks=4)
# The first axis of the mesh, over which the parts are merged, goes from process to process.
mesh = jax.make_mesh((2, 2), ("context", "tensor"))
split = Split(tensor=("tensor",), context=("context",))
results = run(split_pages(inputs, 1, 2), split, mesh)
out, lse = (multihost_utils.process_allgather(x, tiled=True) for x in results)
owners = [[device.process_index for device in row] for row in mesh.devices]
if jax.process_index() == 0:
    np.savez(OUT, out=out.astype(np.float32), lse=lse, owners=owners)
