"""joblib on the cluster, scikit-learn's parallelism included.

    from hpcray.util.joblib import register_ray
    register_ray()
    with joblib.parallel_config(backend="ray"): ...
"""


def register_ray() -> None:
    """Make the backend "ray" known to joblib.

    Raises:
      ImportError: joblib (1.5 or newer) is not installed.
    """
    try:
        # Untyped where it is installed, and not found where it is not.
        from joblib import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
            register_parallel_backend,
        )

        from hpcray.util.joblib.ray_backend import RayBackend
    except ImportError as error:
        raise ImportError(
            f"the joblib backend needs joblib 1.5 or newer ({error}): pip install joblib"
        ) from error
    register_parallel_backend("ray", RayBackend)


__all__ = ["register_ray"]
