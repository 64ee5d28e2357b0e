"""Options about recording the run in a tracker."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Tracking: curves in TensorBoard or Weights & Biases."""

    logging_dir: str | None = option(
        None, help="folder of logs, with a folder for every run; giving it turns TensorBoard on"
    )
    log_with: str | None = option(
        None,
        help="tracker; all means TensorBoard and wandb; tensorboard when --logging_dir is given",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, help="put before the date in the name of the log folder")
    log_tracker_name: str | None = option(None, help="project name in the tracker; named after the task when not given")
    log_tracker_config: str | None = option(
        None,
        help="TOML file with a table [wandb] of arguments for wandb.init and a table [tensorboard] of arguments for "
        "SummaryWriter",
    )
    log_config: bool = option(False, help="record the options in the tracker, without paths and secrets")
    wandb_run_name: str | None = option(None, help="run name in wandb")
    wandb_api_key: str | None = option(
        None,
        help="wandb key; better set WANDB_API_KEY in the environment or use `wandb login`, because a command line can "
        "be read by others",
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers in use."""
        if self.log_with == "all":
            return ("tensorboard", "wandb")
        if self.log_with:
            return (self.log_with,)
        return ("tensorboard",) if self.logging_dir else ()

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.log_with in ("tensorboard", "all") and self.logging_dir is None:
            yield Problem("--log_with", "needs --logging_dir", self.log_with)
