# /// script
# dependencies = ["pymoo"]
# ///
"""pymoo's NSGA-II evaluates its population with `RayParallelization`."""

import numpy as np
import ray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.ray import RayParallelization


class Parabolas(ElementwiseProblem):
    def __init__(self, **kwargs):
        super().__init__(n_var=2, n_obj=2, xl=-2.0, xu=2.0, **kwargs)

    def _evaluate(self, x, out, *args, **kwargs):
        out["F"] = [np.sum(x**2), np.sum((x - 1) ** 2)]


if __name__ == "__main__":
    ray.init(num_cpus=2)
    problem = Parabolas(elementwise_runner=RayParallelization())
    result = minimize(problem, NSGA2(pop_size=20), ("n_gen", 15), seed=1)
    assert len(result.F) > 5 and np.all(result.F >= 0) and result.F.min() < 0.1
