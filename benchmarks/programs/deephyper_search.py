# /// script
# dependencies = ["deephyper"]
# ///
"""deephyper's `RayEvaluator`, which awaits refs in an event loop, under its search."""

import tempfile

import ray
from deephyper.evaluator import RayEvaluator
from deephyper.hpo import HpProblem, RandomSearch


def run(job):
    return -((job.parameters["x"] - 2.0) ** 2)


if __name__ == "__main__":
    problem = HpProblem()
    problem.add_hyperparameter((-10.0, 10.0), "x")
    evaluator = RayEvaluator(run, num_cpus=2, num_cpus_per_task=1)
    with tempfile.TemporaryDirectory() as folder:
        search = RandomSearch(problem, random_state=1, log_dir=folder)
        results = search.search(evaluator, max_evals=30)
    assert len(results) >= 30 and results["objective"].max() > -1.0
    ray.shutdown()
