# /// script
# dependencies = ["scikit-learn", "joblib"]
# ///
"""scikit-learn searches a grid, and grows a forest, through joblib's backend "ray"."""

import joblib
import ray
from ray.util.joblib import register_ray
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

if __name__ == "__main__":
    ray.init(num_cpus=2)
    register_ray()
    digits = load_digits()
    with joblib.parallel_backend("ray"):
        search = GridSearchCV(SVC(), {"C": [0.1, 1, 10], "gamma": [1e-3, 1e-2]}, cv=3)
        search.fit(digits.data, digits.target)
        forest = RandomForestClassifier(50, random_state=0, n_jobs=2)
        forest.fit(digits.data, digits.target)
    assert search.best_score_ > 0.9 and forest.score(digits.data, digits.target) > 0.9
