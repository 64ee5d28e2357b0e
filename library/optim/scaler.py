"""The loss scaler of fp16 training."""

from typing import Any

import torch
from torch import Tensor


class HalfGradScaler(torch.amp.GradScaler):
    """As torch's, but gradients may be in float16 themselves, as they are with `--full_fp16`."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> Any:
        del allow_fp16
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
