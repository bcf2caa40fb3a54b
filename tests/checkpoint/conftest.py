"""The small run of the training's tests."""

from tests.training.conftest import config, dataset, make_trainer

__all__ = ["config", "dataset", "make_trainer"]
