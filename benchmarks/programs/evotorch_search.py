# /// script
# dependencies = ["evotorch"]
# ///
"""evotorch's SNES with its population spread over actors, and gradients computed in them."""

import torch
from evotorch import Problem
from evotorch.algorithms import PGPE, SNES
from evotorch.logging import StdOutLogger


def rastrigin(x):
    return 10 * len(x) + torch.sum(x**2 - 10 * torch.cos(2 * torch.pi * x))


def sphere(x):
    return torch.sum(x**2)


if __name__ == "__main__":
    problem = Problem("min", rastrigin, solution_length=5, initial_bounds=(-3, 3), num_actors=2)
    searcher = SNES(problem, popsize=40, stdev_init=1.0)
    StdOutLogger(searcher, interval=10)
    searcher.run(20)
    assert searcher.status["best_eval"] < 40
    problem.kill_actors()

    problem = Problem("min", sphere, solution_length=5, initial_bounds=(-3, 3), num_actors=2)
    searcher = PGPE(problem, popsize=40, center_learning_rate=0.5, stdev_learning_rate=0.1,
                    stdev_init=0.5, distributed=True)
    searcher.run(30)
    assert searcher.status["mean_eval"] < 20
