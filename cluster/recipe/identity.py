"""Create the identity that is stored with a model's weights, from its recipe and the classes of its data."""

from __future__ import annotations

from collections.abc import Sequence

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import dump_recipe
from m2f.data_pipeline.categories import Category
from m2f.data_pipeline.label_space import LabelSpace
from m2f.eval.config import EvaluationConfig
from m2f.model.config import ModelConfig
from m2f.trainer.checkpoint.identity import InputRules, ModelIdentity


def identity_of(config: RunConfig, classes: Sequence[Category]) -> ModelIdentity:
    """Return the identity of the model that a recipe trains; `classes` are in label order."""
    space = LabelSpace(config.data.task, tuple(classes))
    return model_identity(space, config.model, config.evaluation, dump_recipe(config))


def model_identity(space: LabelSpace, model: ModelConfig, evaluation: EvaluationConfig, recipe: str) -> ModelIdentity:
    """Return the identity of a model from its parts. `recipe` is YAML, or "" if it is unknown."""
    return ModelIdentity(
        label_spaces=(space,),
        input=InputRules(
            shortest_edge=evaluation.shortest_edge,
            max_size=evaluation.max_size,
            pixel_mean=model.pixel_mean,
            pixel_std=model.pixel_std,
        ),
        num_queries=model.transformer_decoder.num_queries,
        recipe=recipe,
    )
