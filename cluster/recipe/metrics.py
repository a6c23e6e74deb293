"""Check the metrics that training uses: every one must be a metric that an evaluation set computes."""

from __future__ import annotations

import difflib

from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.config import EvaluationConfig
from m2f.trainer.config import TrainingConfig


def metric_problems(training: TrainingConfig, evaluation: EvaluationConfig) -> list[str]:
    """Return a message for each metric that training uses, but that no evaluation set computes."""
    sets = {evaluated.label: evaluation.for_set(evaluated) for evaluated in evaluation.sets}
    labels = f"; it must start with one of {', '.join(f'{label}/' for label in sets)}" if sets else ", as it is empty"
    problems = []
    for setting, metric in training.used_metrics.items():
        label, _, name = metric.rpartition("/")
        if label not in sets:
            problems.append(f"{setting} is {metric!r}, but evaluation.sets has no such set{labels}")
        elif name not in (computed := _computed_metrics(sets[label])):
            close = difflib.get_close_matches(name, computed, n=1)
            remedy = f"did you mean `{label}/{close[0]}`?" if close else f"known: {', '.join(computed) or 'none'}"
            tasks = ", ".join(sets[label].tasks) or "none"
            problems.append(
                f"{setting} is {metric!r}, which the evaluation of {label} (tasks: {tasks}) lacks; {remedy}"
            )
    return problems


def _computed_metrics(evaluation: EvaluationConfig) -> list[str]:
    """Return the names of all metrics that an evaluation can compute. They do not depend on the classes."""
    from m2f.eval.results.results import EvaluationSubject
    from m2f.eval.results.states import EvaluationStates

    classes = CategoryTable((Category(1, "thing", True, (0, 0, 0)), Category(2, "stuff", False, (0, 0, 0))))
    empty = EvaluationStates.empty(classes, evaluation.tasks, evaluation.extra_metrics)
    return list(empty.compute(classes, EvaluationSubject(dataset="", fingerprint="")).metrics())
