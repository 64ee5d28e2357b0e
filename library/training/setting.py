"""What every building step looks at."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from library.checkpoint.hub import Uploader
from library.family import Family
from library.strategy_base import Strategies
from library.tracking.trackers import Trackers
from library.training.caches import CacheSetting
from library.training.checks import Inspected
from library.training.distributed import Processes
from library.training.plan import RunPlan
from library.training.resume import Resume
from library.training.state import TrainState

Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every building step looks at; `uploader` is told of what is saved, `trackers` of sample images."""

    family: Family
    task_name: str
    plan: RunPlan
    inspected: Inspected
    processes: Processes
    uploader: Uploader | None = None
    trackers: Trackers | None = None

    @property
    def strategies(self) -> Strategies:
        """Of the family."""
        return self.inspected.strategies

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.processes.device

    def caches(self) -> CacheSetting:
        """What decides how caches are made."""
        return CacheSetting(
            family=self.family,
            options=self.plan.options,
            strategies=self.strategies,
            processes=self.processes,
            seed=self.plan.seed,
        )


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        state: counters.
        resume: the state it goes on from.
        identity: what states of the run say of it.
        keep_record: micro-steps of an earlier record that stay; None begins a new one.
    """

    state: TrainState
    resume: Resume | None
    identity: Mapping[str, Any]
    keep_record: int | None
