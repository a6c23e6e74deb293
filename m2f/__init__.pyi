"""Type stub for `__init__.py`, which imports each public name when it is first used."""

from pathlib import Path

from m2f.cluster.api.dataset import Dataset as Dataset
from m2f.cluster.api.evaluate import evaluate as evaluate
from m2f.cluster.api.model import Model as Model
from m2f.cluster.api.model import load as load
from m2f.cluster.api.result import Result as Result
from m2f.cluster.api.train import Run as Run
from m2f.cluster.api.train import TrainingFailedError as TrainingFailedError
from m2f.cluster.api.train import train as train
from m2f.eval.arrays import Instances as Instances
from m2f.eval.arrays import PanopticImage as PanopticImage
from m2f.eval.functions import evaluate_instances as evaluate_instances
from m2f.eval.functions import evaluate_panoptic as evaluate_panoptic
from m2f.eval.functions import evaluate_semantic as evaluate_semantic
from m2f.model.errors import UserError as UserError

__version__: str
HOME: Path
ROOT: Path
