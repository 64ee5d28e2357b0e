"""Options of runs on several devices."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """Several devices: distributed data parallel."""

    ddp_timeout: int | None = option(
        None, help="minutes that processes wait for each other; torch's own limit when not given"
    )
    ddp_gradient_as_bucket_view: bool = option(False, help="let gradients share memory with communication buffers")
    ddp_static_graph: bool = option(False, help="promise that every step uses the same weights")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, ddp_timeout=self.ddp_timeout)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """DeepSpeed: weights and states spread over devices."""

    deepspeed: bool = option(False, help="train with DeepSpeed")
    zero_stage: int = option(
        2, help="what is spread: 1 optimizer, 2 gradients too, 3 weights too", choices=(0, 1, 2, 3)
    )
    offload_optimizer_device: str | None = option(
        None, help="keep optimizer states there, stages 2 and 3", choices=("cpu", "nvme")
    )
    offload_optimizer_nvme_path: str | None = option(None, help="folder for optimizer states")
    offload_param_device: str | None = option(None, help="keep weights there, stage 3", choices=("cpu", "nvme"))
    offload_param_nvme_path: str | None = option(None, help="folder for weights")
    zero3_init_flag: bool = option(False, help="spread weights already while loading, stage 3")
    zero3_save_16bit_model: bool = option(False, help="save 16-bit weights, stage 3")
    fp16_master_weights_and_gradients: bool = option(False, help="keep the optimizer's weights in float16, stage 2")
