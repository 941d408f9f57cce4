# /// script
# dependencies = ["dynesty"]
# ///
"""dynesty integrates a normal distribution over a cube with a `ray.util.multiprocessing.Pool`."""

import math

import dynesty
import numpy as np
import ray
from ray.util.multiprocessing import Pool


def log_likelihood(x):
    return -0.5 * np.sum(x**2) - math.log(2 * math.pi)


def prior(u):
    return 10 * u - 5


if __name__ == "__main__":
    ray.init(num_cpus=2)
    with Pool(2) as pool:
        sampler = dynesty.NestedSampler(
            log_likelihood, prior, 2, nlive=100, pool=pool, queue_size=2,
            rstate=np.random.default_rng(0))
        sampler.run_nested(dlogz=0.5, print_progress=False)
    assert abs(sampler.results.logz[-1] + math.log(100)) < 1.0
