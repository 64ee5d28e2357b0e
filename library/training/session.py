"""Everything a step needs, as one value; built once, read by the engine."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from library.data.loader import Window
from library.diffusion.losses import SampleLoss
from library.modules.components import Components
from library.optim.driver import OptimizerDriver
from library.strategy_base import Strategies
from library.training.conditioning import ConditioningSource
from library.training.control import Control
from library.training.distributed import Processes
from library.training.inputs import StepInputsSource
from library.training.plan import RunPlan
from library.training.replay import FailureWriter, StepRecorder
from library.training.report import Progress
from library.training.services import ServiceList
from library.training.state import TrainState
from library.training.tasks.base import TrainingTask
from library.training.weights import TrainedWeights


class WindowSource(Protocol):
    """Training data as the engine sees it."""

    def windows(self, epoch: int, *, start: int = 0, step: int = 0) -> Iterator[Window]:
        """The windows of an epoch from a position on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of a run; members have their own state, this record has none."""

    plan: RunPlan
    state: TrainState
    processes: Processes
    components: Components
    strategies: Strategies
    task: TrainingTask
    data: WindowSource
    inputs: StepInputsSource
    criterion: SampleLoss
    conditioning: ConditioningSource
    optimizer: OptimizerDriver
    weights: TrainedWeights
    progress: Progress
    services: ServiceList
    recorder: StepRecorder | None
    control: Control
    failures: FailureWriter
    autocast: Callable[[], AbstractContextManager[None]]
