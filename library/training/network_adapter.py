"""Drives adapter modules through their customary interface: ours, lycoris.kohya, or any other."""

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.base.errors import UserError
from library.base.logs import logger
from library.modules.components import Components
from library.options.network import NetworkOptions


def import_network_module(name: str) -> ModuleType:
    """The module behind `--network_module`; modules beside the script are found too.

    Raises:
        UserError: it cannot be imported or makes no networks.
    """
    beside = str(Path(sys.argv[0]).resolve().parent)
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        hint = "; run: pip install lycoris-lora" if name.startswith("lycoris") else ""
        raise UserError("--network_module", name, f"cannot be imported: {error}{hint}") from error
    if not hasattr(module, "create_network"):
        raise UserError("--network_module", name, "has no function create_network")
    return module


def is_ours(module: ModuleType) -> bool:
    """Whether a network module is made with our engine, which does without text encoders that it does not train."""
    return hasattr(module.create_network, "check_arguments")


def parse_network_arguments(pairs: Sequence[str] | None) -> dict[str, str]:
    """`["conv_dim=4"]` as a dictionary of text, as network modules expect it."""
    arguments: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError("--network_args", pair, "expected name=value")
        arguments[name] = value
    return arguments


@dataclass
class KohyaNetworkAdapter:
    """One network and what it can do.

    Attributes:
        network: the module with the trained weights.
        module_name: where it came from.
        arguments: network arguments as given, with the dropout that is handed on.
        ours: whether the module is one of this program.
    """

    network: Any
    module_name: str
    arguments: dict[str, Any]
    ours: bool = True

    @classmethod
    def create(cls, options: NetworkOptions, components: Components, default_module: str) -> "KohyaNetworkAdapter":
        """Build the network of the options for loaded components; nothing is changed in them yet.

        Raises:
            UserError: options that do not fit together or that the module refuses.
        """
        name = options.network_module or default_module
        module = import_network_module(name)
        arguments: dict[str, Any] = dict(parse_network_arguments(options.network_args))
        arguments.setdefault("dropout", options.network_dropout)
        encoders = _encoder_argument(components, ours=is_ours(module))
        if options.network_train_unet_only and is_ours(module):
            # whether text encoders are loaded depends on caches, which must not change what is drawn for the denoiser
            encoders = [None] * len(encoders) if isinstance(encoders, list) else None
        unet, vae = components.published_denoiser, components.vae
        if options.dim_from_weights:
            if not options.network_weights:
                raise UserError("--dim_from_weights", message="needs --network_weights")
            network, _ = module.create_network_from_weights(
                1, options.network_weights, vae, encoders, unet, **arguments
            )
        else:
            network = module.create_network(
                1.0,
                options.network_dim,
                options.network_alpha,
                vae,
                encoders,
                unet,
                neuron_dropout=options.network_dropout,
                **arguments,
            )
        if network is None:
            raise UserError("--network_module", name, "made no network for this model")
        return cls(network, name, arguments, is_ours(module))

    def prepare(self, namespace: Any) -> None:
        """Hand all options to networks that ask for them."""
        if hasattr(self.network, "prepare_network"):
            self.network.prepare_network(namespace)

    def apply(self, components: Components, *, text_encoders: bool, denoiser: bool) -> None:
        """Install the network in the components."""
        self.network.apply_to(
            _encoder_argument(components, ours=self.ours), components.published_denoiser, text_encoders, denoiser
        )

    def load(self, path: str) -> None:
        """Take over weights from a file."""
        info = self.network.load_weights(path)
        logger.info("network weights from %s: %s", path, info)

    def param_groups(
        self, text_encoder_lr: Sequence[float] | None, unet_lr: float | None, learning_rate: float
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their log names."""
        if hasattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs"):
            method = self.network.prepare_optimizer_params_with_multiple_te_lrs
            result = method(text_encoder_lr, unet_lr, learning_rate)
        else:
            first = text_encoder_lr[0] if text_encoder_lr else None
            method = self.network.prepare_optimizer_params
            takes_default = len(inspect.signature(method).parameters) > 2
            result = method(first, unet_lr, learning_rate) if takes_default else method(first, unet_lr)
        groups, names = result if isinstance(result, tuple) else (result, [])
        groups = [dict(group, params=list(group["params"])) for group in groups]
        groups = [group for group in groups if group["params"]]
        return groups, list(names) or _default_names(len(groups))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything the optimizer changes."""
        return (
            [p for p in self.network.get_trainable_params() if isinstance(p, nn.Parameter)]
            if hasattr(self.network, "get_trainable_params")
            else list(self.network.parameters())
        )

    def start(self, components: Components) -> None:
        """Called once before training."""
        self._call("prepare_grad_etc", _encoder_argument(components, ours=self.ours), components.published_denoiser)

    def on_epoch_start(self, components: Components) -> None:
        """Called before each epoch; puts the network into training mode."""
        self._call("on_epoch_start", _encoder_argument(components, ours=self.ours), components.published_denoiser)
        self.network.train()

    def on_step_start(self, components: Components) -> None:
        """Called before each micro-step."""
        self._call("on_step_start", _encoder_argument(components, ours=self.ours), components.published_denoiser)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """The network has no effect inside.

        Raises:
            UserError: the network cannot do it.
        """
        if not hasattr(self.network, "set_multiplier"):
            message = f"{self.module_name} cannot be switched off while training"
            raise UserError("diff_output_preservation", message=message)
        strength = getattr(self.network, "multiplier", 1.0)
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(strength)

    def on_gradients(self) -> None:
        """Called after the last backward of a step."""
        self._call("update_grad_norms")
        self._call("update_norms")

    def limit_norms(self, limit: float, device: torch.device) -> dict[str, float]:
        """Scale down weights whose norm exceeds the limit.

        Raises:
            UserError: the network cannot do it.
        """
        if not hasattr(self.network, "apply_max_norm_regularization"):
            raise UserError("--scale_weight_norms", limit, f"{self.module_name} cannot limit weight norms")
        scaled, mean, largest = self.network.apply_max_norm_regularization(limit, device)
        return {"max_norm/keys_scaled": scaled, "max_norm/avg_key_norm": mean, "max_norm/max_key_norm": largest}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the network's file, complete or not at all."""
        self.network.save_weights(str(path), dtype, dict(metadata))

    def _call(self, method: str, *arguments: Any) -> None:
        function = getattr(self.network, method, None)
        if function is not None:
            function(*arguments)


def _encoder_argument(components: Components, *, ours: bool = True) -> Any:
    """One text encoder is passed as a module, several as a list.

    Args:
        components: of the model.
        ours: whether the network module is one of this program; others expect a module in each place.
    """
    encoders = components.published_text_encoders
    if len(encoders) == 1:
        return encoders[0]
    return [nn.Module() if encoder is None and not ours else encoder for encoder in encoders]


def _default_names(count: int) -> list[str]:
    return ["unet"] if count == 1 else ["textencoder", "unet"] if count == 2 else [f"group{i}" for i in range(count)]


def merge_base_weights(
    options: NetworkOptions, components: Components, default_module: str, dtype: torch.dtype
) -> None:
    """Merge the adapters of `--base_weights` into the model before the new one is made."""
    files = options.base_weights or []
    strengths: Iterable[float] = [*(options.base_weights_multiplier or []), *([1.0] * len(files))]
    for path, strength in zip(files, strengths):
        module = import_network_module(options.network_module or default_module)
        encoders = _encoder_argument(components, ours=is_ours(module))
        unet = components.published_denoiser
        network, weights = module.create_network_from_weights(
            strength, path, components.vae, encoders, unet, for_inference=True
        )
        network.merge_to(encoders, unet, weights, dtype, "cpu")
        logger.info("merged %s with strength %s", path, strength)
