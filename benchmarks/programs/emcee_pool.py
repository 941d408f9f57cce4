# /// script
# dependencies = ["emcee"]
# ///
"""emcee samples a normal distribution; the walkers are evaluated in `ray.util.multiprocessing`."""

import emcee
import numpy as np
import ray
from ray.util.multiprocessing import Pool

MEAN = np.array([1.0, -2.0])


def log_probability(x):
    return -0.5 * np.sum((x - MEAN) ** 2)


if __name__ == "__main__":
    ray.init(num_cpus=2)
    rng = np.random.default_rng(0)
    with Pool(2) as pool:
        sampler = emcee.EnsembleSampler(16, 2, log_probability, pool=pool)
        sampler.run_mcmc(MEAN + rng.normal(size=(16, 2)), 100)
    assert np.allclose(sampler.get_chain(discard=20, flat=True).mean(axis=0), MEAN, atol=0.5)
