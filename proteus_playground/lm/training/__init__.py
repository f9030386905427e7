"""Training a language model: a recipe as data, and one loop that can be stopped, resumed and distributed."""

from ...common.progress import Stopped
from ..losses import IGNORED
from .recipe import Batch, Batches, Job, Recipe, Stage
from .run import Step, read_log, train

__all__ = ["IGNORED", "Batch", "Batches", "Job", "Recipe", "Stage", "Step", "Stopped", "read_log", "train"]
