"""Run by `torch.distributed.run` in the tests: pass 1 shared by ranks, each writing the buffer it ends with.

Each rank computes with another number of threads, on which nothing may depend.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from test_stream import PLAN, Array, prompted

from proteus_playground.common.processes import together
from proteus_playground.streaming.run import run

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with together(torch.device("cpu")) as (rank, ranks):
        torch.set_num_threads(1 + rank)
        *_, last = run(Array.random(), prompted(), PLAN, checkpoint=folder / "c.safetensors")
        np.savez(folder / f"{rank}.npz", ranks=ranks, **vars(last.buffer))
