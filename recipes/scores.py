"""Metrics of the recipes, as ``evaluate`` modules made here: ``evaluate.load`` would need the hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
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


class Entities(evaluate.Metric):
    """Precision, recall and F1 of whole entities by seqeval, and accuracy of single tags."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        features = datasets.Features({"predictions": tags, "references": tags})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

        entities = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        scores = {name: score(references, predictions, zero_division=0) for name, score in entities.items()}
        return {"accuracy": accuracy_score(references, predictions), **scores}


def entity_metrics(names: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """Return ``compute_metrics`` of a Trainer that tags words; a label -100 is no word's."""
    required("seqeval")

    def compute(prediction: Any) -> dict[str, float]:
        kept = prediction.label_ids != -100
        chosen = np.argmax(prediction.predictions, axis=-1)
        tags = [
            [[names[number] for number in row[mask]] for row, mask in zip(numbers, kept, strict=True)]
            for numbers in (chosen, prediction.label_ids)
        ]
        scores = Entities(keep_in_memory=True).compute(predictions=tags[0], references=tags[1])
        return {name: float(score) for name, score in scores.items()}

    return compute


class Rouge(evaluate.Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L, mean F1, by rouge_score with its stemmer."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
        return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in scores[0]}


def rouge_metrics(tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """Return ``compute_metrics`` of a Trainer that generates text; -100 fills up both generated tokens and labels."""
    required("rouge_score")

    def compute(prediction: Any) -> dict[str, float]:
        texts = [
            tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        return Rouge(keep_in_memory=True).compute(predictions=texts[0], references=texts[1])

    return compute


class Perplexity(evaluate.Metric):
    """Exponential of the mean loss of a token, each given as a prediction."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("float32")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any) -> dict[str, float]:
        return {"perplexity": float(np.exp(np.mean(predictions, dtype=np.float64)))}


def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Serve as ``preprocess_logits_for_metrics``: the loss of each next token, not all its logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")


def perplexity_metrics(prediction: Any) -> dict[str, float]:
    """Serve as ``compute_metrics`` of a Trainer that predicts the next token of full blocks."""
    return Perplexity(keep_in_memory=True).compute(predictions=prediction.predictions.ravel())


class WordErrorRate(evaluate.Metric):
    """Words put in, left out or replaced for each word said, by jiwer."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        import jiwer  # here, for the recipes without speech

        return {"wer": jiwer.wer(list(references), list(predictions))}


def words(text: str) -> str:
    """Return the words alone, as transcripts are compared: in small letters, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", "", text.casefold()).split())


def speech_metrics(tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """Return ``compute_metrics`` of a Trainer that transcribes."""
    required("jiwer")

    def metrics(prediction: Any) -> dict[str, float]:
        said, heard = (
            [words(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            for ids in (np.where(ids < 0, tokenizer.pad_token_id, ids)
                        for ids in (prediction.label_ids, prediction.predictions))
        )  # fmt: skip
        return WordErrorRate(keep_in_memory=True).compute(predictions=heard, references=said)

    return metrics


def required(name: str) -> None:
    """Tell before a run, not at its first evaluation, that the package of a metric is missing."""
    if importlib.util.find_spec(name) is None:
        raise SystemExit(f"the metric of this recipe needs the package {name}. Run: pip install {name}")
