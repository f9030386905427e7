"""Training: recipes as data, and one loop that can be stopped, resumed and shared by processes."""

from ...common.progress import Stopped
from ..losses import IGNORED
from .loop import read_log, train
from .recipe import Batch, Batches, Job, Recipe, Stage
from .run import Step

__all__ = ["IGNORED", "Batch", "Batches", "Job", "Recipe", "Stage", "Step", "Stopped", "read_log", "train"]
