# /// script
# dependencies = ["xgboost_ray", "xgboost<2.1", "scikit-learn"]
# ///
"""xgboost_ray trains on two actors, and predicts with them."""

import ray
from sklearn.datasets import load_breast_cancer
from xgboost_ray import RayDMatrix, RayParams, predict, train

if __name__ == "__main__":
    ray.init(num_cpus=2)
    data, target = load_breast_cancer(return_X_y=True)
    params = RayParams(num_actors=2, cpus_per_actor=1)
    result = {}
    matrix = RayDMatrix(data, target)
    booster = train({"objective": "binary:logistic", "eval_metric": ["logloss", "error"]},
                    matrix, num_boost_round=10, evals=[(matrix, "train")], evals_result=result,
                    ray_params=params, verbose_eval=False)
    assert result["train"]["error"][-1] < 0.05
    answers = predict(booster, RayDMatrix(data), ray_params=params)
    assert ((answers > 0.5) == target).mean() > 0.95
