"""Held-out measures: perplexity, multiple choice by likelihood, classification, exact match of generated text."""

from mor_jax.evaluation.choice import ChoiceQuestion, choice, choice_batches
from mor_jax.evaluation.classification import classification
from mor_jax.evaluation.generation import GenerationQuestion, check_generated, exact_match, left_padded
from mor_jax.evaluation.perplexity import perplexity, target_log_likelihood
from mor_jax.evaluation.tasks import task_means
from mor_jax.finite import NotFiniteError

__all__ = [
    "ChoiceQuestion",
    "GenerationQuestion",
    "NotFiniteError",
    "check_generated",
    "choice",
    "choice_batches",
    "classification",
    "exact_match",
    "left_padded",
    "perplexity",
    "target_log_likelihood",
    "task_means",
]
