"""Program: one of two processes that add up numbers until one of them ends badly. Run by test_distributed.py."""

import os
import signal
import sys
import time

import jax
import numpy as np

from cxa_jax import distributed
from cxa_jax.console import log_to_console
from cxa_jax.distributed import first_alone, joined
from cxa_jax.errors import UserError
from cxa_jax.sharding import create_mesh, fetchable, own_rows, put_batch


def end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "user error":
        raise UserError("the data are not there")
    if how == "exit":
        sys.exit("error: enough")
    raise RuntimeError("a bug")


def main(coordinator: str, process_id: str, victim: str, how: str) -> None:
    log_to_console()
    distributed.HEARTBEAT_TIMEOUT_S = 10  # a test need not wait for a minute
    with joined(coordinator, 2, int(process_id), auto=False):
        mesh = create_mesh()
        with first_alone("preparation"):
            print("prepared", flush=True)
        assert own_rows(8, mesh).tolist() == [4 * int(process_id) + i for i in range(4)]
        add = jax.jit(lambda x: x + x.sum(), out_shardings=fetchable(mesh))
        for step in range(30 if how in ("well", "late") else 3000):
            batch = np.zeros(8, np.float32)
            batch[own_rows(8, mesh)] = own_rows(8, mesh)  # the other rows are the other process'
            np.testing.assert_array_equal(np.asarray(add(put_batch(batch, mesh))), np.arange(8) + 28)
            if step == 20 and process_id == victim and how != "late":
                end(how)
            time.sleep(0.01)
        if process_id == victim:  # the other waits for it to take leave
            time.sleep(2)
            end("user error")


if __name__ == "__main__":
    main(*sys.argv[1:])
