"""Metrics of the recipes, as ``evaluate`` modules made here: ``evaluate.load`` would need the hub."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support


class Classification(evaluate.Metric):
    """Accuracy and macro precision, recall and F1 by scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average="macro", zero_division=0
        )
        accuracy = accuracy_score(references, predictions)
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Serve as ``compute_metrics`` of a Trainer that classifies."""
    scores = Classification(keep_in_memory=True).compute(
        predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids
    )
    return {name: float(score) for name, score in scores.items()}
