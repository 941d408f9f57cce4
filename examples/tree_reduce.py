r"""Add up large arrays in a tree; only refs pass through the driver.

    make  make  make  make  make  make  make  make      8 arrays, one task each
      \   /       \   /       \   /       \   /
       add         add         add         add          a task starts when both inputs exist
          \       /               \       /
             add                     add
                 \                 /
                        add                             one array comes back

Arguments that are refs arrive as values: read-only arrays that lie in shared memory, not copies.

    python examples/tree_reduce.py
    mpirun -n 2 hpcray run examples/tree_reduce.py --mb 32
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import hpcray as ray

Array = np.ndarray[Any, np.dtype[np.float64]]


@ray.remote
def make(value: float, nbytes: int) -> Array:
    return np.full(nbytes // 8, value)


@ray.remote
def add(a: Array, b: Array) -> Array:
    return a + b


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arrays", type=int, default=16)
    parser.add_argument("--mb", type=int, default=8, help="size of one array in MB")
    args = parser.parse_args()
    ray.init()

    started = time.perf_counter()
    level = [make.remote(float(i), args.mb * 1_000_000) for i in range(args.arrays)]
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [add.remote(a, b) for a, b in pairs] + level[len(level) // 2 * 2 :]
    # Freeing is automatic: each inner array goes when the last task that reads it is done.
    result = ray.get(level[0])
    elapsed_s = time.perf_counter() - started

    expected = sum(range(args.arrays))
    assert result.shape == (args.mb * 125_000,) and (result == expected).all()
    mb_per_s = (2 * args.arrays - 1) * args.mb / elapsed_s  # inputs and all sums
    print(f"{args.arrays} arrays of {args.mb} MB added up in {elapsed_s:.2f} s: "
          f"{mb_per_s:.0f} MB/s of new arrays; every element is {expected}")
    ray.shutdown()


if __name__ == "__main__":
    main()
