"""Training: recipes as data, and one loop that can be stopped, resumed and shared by processes."""

from ..losses import IGNORED
from ..progress import Stopped
from .loop import read_log, train
from .recipe import Batch, Batches, Job, Recipe, Stage
from .run import Step

__all__ = ["IGNORED", "Batch", "Batches", "Job", "Recipe", "Stage", "Step", "Stopped", "read_log", "train"]
