"""Train an adapter beside a frozen model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.batch import Conditioning, StepInputs
from library.modules.components import Components
from library.options.network import NetworkOptions
from library.strategy_base import Strategies
from library.training.network_adapter import KohyaNetworkAdapter


class NetworkTask:
    """An adapter on the denoiser and, where asked for, on text encoders.

    Args:
        options: of the network.
        components: the frozen model.
        strategies: of its family.
        adapter: the network, already applied.
        learning_rate: default of all groups.
        save_dtype: number format of saved files; None keeps the trained one.
        device: where the model computes.
    """

    def __init__(
        self,
        options: NetworkOptions,
        components: Components,
        strategies: Strategies,
        adapter: KohyaNetworkAdapter,
        *,
        learning_rate: float,
        save_dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.options = options
        self.components = components
        self.strategies = strategies
        self.adapter = adapter
        self.learning_rate = learning_rate
        self.save_dtype = save_dtype
        self.device = device

    def param_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        """See TrainingTask."""
        groups, names = self.adapter.param_groups(
            self.options.text_encoder_lr, self.options.unet_lr, self.learning_rate
        )
        if not groups:
            message = "nothing would be trained; raise --learning_rate, --unet_lr or --text_encoder_lr above 0"
            raise UserError("--learning_rate", self.learning_rate, message)
        return groups, names

    def weights(self) -> dict[str, Tensor]:
        """Everything that a state has to hold."""
        return dict(self.adapter.network.state_dict())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """See TrainingTask."""
        return self.adapter.trainable_parameters()

    def on_train_start(self) -> None:
        """See TrainingTask."""
        self.adapter.start(self.components)

    def on_epoch_start(self) -> None:
        """See TrainingTask."""
        self.adapter.on_epoch_start(self.components)

    def on_step_start(self) -> None:
        """See TrainingTask."""
        self.adapter.on_step_start(self.components)

    def predict(self, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """See TrainingTask."""
        assert self.components.denoiser is not None
        return self.strategies.denoising.predict(self.components.denoiser, inputs, conditioning)

    def predict_untrained(self, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """See TrainingTask."""
        with self.adapter.silent():
            return self.predict(inputs, conditioning)

    def on_gradients(self) -> None:
        """See TrainingTask."""
        self.adapter.on_gradients()

    def on_parameters_updated(self) -> dict[str, float]:
        """Limit weight norms with `--scale_weight_norms`."""
        limit = self.options.scale_weight_norms
        return self.adapter.limit_norms(limit, self.device) if limit else {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The adapter's dropouts rest while samples are made or validation runs."""
        self.adapter.network.eval()
        try:
            yield
        finally:
            self.adapter.network.train()

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """See TrainingTask."""
        self.adapter.save(path, self.save_dtype, metadata)
