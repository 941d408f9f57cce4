"""A parameter server: one actor holds the weights of a linear model, tasks bring gradients.

                      weights (one ref for all readers)
    ParameterServer ------------------------------------> gradient tasks
          ^                                                    |
          +---------- apply(gradient), as each finishes -------+

Asynchronous on purpose: the server applies each gradient as it comes, and the task that finished
gets fresh weights, so a slow worker holds nobody up. `ray.wait` is what makes this a short loop.

    python examples/parameter_server.py
    mpirun -n 2 hpcray run examples/parameter_server.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

import hpcray as ray

Vector = np.ndarray[Any, np.dtype[np.float64]]

FEATURES = 2_000
ROWS = 500  # examples in one batch
WORKERS = 4
STEPS = 200


def true_weights() -> Vector:
    return np.random.default_rng(0).normal(size=FEATURES)


@ray.remote
class ParameterServer:
    """Holds the weights. One call at a time, so no lock is needed."""

    def __init__(self, rate: float) -> None:
        self.weights = np.zeros(FEATURES)
        self.rate = rate

    def apply(self, gradient: Vector) -> Vector:
        """Take one step; return the new weights, for the next batch."""
        # A new array and not `-=`: values that were returned earlier must not change.
        self.weights = self.weights - self.rate * gradient
        return self.weights


@ray.remote
def gradient(weights: Vector, batch: int) -> Vector:
    """The gradient of the mean squared error over one batch of made-up data."""
    random = np.random.default_rng([1, batch])
    x = random.normal(size=(ROWS, FEATURES))  # [ROWS, FEATURES]
    y = x @ true_weights()
    gradient_: Vector = 2 / ROWS * x.T @ (x @ weights - y)
    return gradient_


def main() -> None:
    ray.init()
    server = ParameterServer.remote(0.05)
    truth = true_weights()
    weights = ray.put(np.zeros(FEATURES))
    running = {gradient.remote(weights, batch) for batch in range(WORKERS)}

    for step in range(STEPS):
        (done,), _ = ray.wait(list(running), num_returns=1)
        running.remove(done)
        # Refs go straight from task to actor to task: no array passes through this process.
        weights = server.apply.remote(done)
        running.add(gradient.remote(weights, WORKERS + step))
        if step % 40 == 39:
            error = np.linalg.norm(ray.get(weights) - truth) / np.linalg.norm(truth)
            print(f"step {step + 1:4d}: {error:7.2%} away from the true weights")

    ray.shutdown()


if __name__ == "__main__":
    main()
