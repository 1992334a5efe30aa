"""Trained models in use: text out of a language model, labels of texts and images. Knows no DVC and no MLflow."""

from pipeline.serving.served import ImageClassifier, LanguageModel, Sampling, TextClassifier, load, seen_by

__all__ = ["ImageClassifier", "LanguageModel", "Sampling", "TextClassifier", "load", "seen_by"]
