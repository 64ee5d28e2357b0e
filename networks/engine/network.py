"""The network object: all adapters of a model, behind the network API of training scripts.

The API (`apply_to`, `load_weights`, `prepare_optimizer_params*`, `save_weights`, ...) is the de-facto one of
kohya-style trainers, so that third-party network modules and ours are driven through the same calls.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import CheckpointError, UserError
from library.base.logs import logger
from networks.engine.arguments import FLAG
from networks.engine.merge import add_to_weight, stored_delta
from networks.engine.modules import AdapterSettings, GgpoLoRAModule, LoRAModule
from networks.engine.param_groups import (
    GroupRules,
    LearningRates,
    Section,
    optimizer_groups,
    spread_text_encoder_rates,
)
from networks.engine.selection import Target
from networks.engine.targets import DENOISER
from networks.engine.weights import check_fit, check_native, read_weights, restore_split_alphas, write_weights

Encoders = nn.Module | Sequence[nn.Module | None] | None


@dataclass(frozen=True, kw_only=True)
class NetworkTraits:
    """Facts about a network besides its adapters.

    Attributes:
        dim, alpha: the defaults, for information.
        num_text_encoders: entries of the text-encoder list, gaps included.
        prefixes: key prefixes of the model's parts.
        split_counts: layers that `split_qkv` splits -> number of parts.
        rules: grouping of parameters.
        train_t5xxl: whether the T5 encoder has adapters.
    """

    dim: int
    alpha: float
    num_text_encoders: int
    prefixes: Sequence[str]
    split_counts: Mapping[str, int] = field(default_factory=dict)
    rules: GroupRules = field(default_factory=GroupRules)
    train_t5xxl: bool = False


class AdapterNetwork(nn.Module):
    """All adapters of a model; `state_dict` is what an adapter file holds.

    Attributes:
        text_encoder_loras, unet_loras: adapters by part, in module order.
        multiplier: strength of the whole network.
        train_t5xxl: asked by trainers of families with a T5 encoder.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        traits: NetworkTraits,
        *,
        settings: AdapterSettings | None = None,
        adapter: type[LoRAModule] = LoRAModule,
    ) -> None:
        super().__init__()
        settings = settings or AdapterSettings()
        self.traits = traits
        self.multiplier: float | Tensor = settings.multiplier
        self.lora_dim, self.alpha = traits.dim, traits.alpha
        self.train_t5xxl = traits.train_t5xxl
        self.text_encoder_loras: list[LoRAModule] = []
        self.unet_loras: list[LoRAModule] = []
        for target in targets:
            kind = _adapter_class(adapter, settings, target)
            module = kind(
                target.name,
                target.module,
                rank=target.rank.dim,
                alpha=target.rank.alpha,
                settings=settings,
                split=target.split,
            )
            module.part, module.path, module.block = target.part, target.path, target.block
            (self.unet_loras if target.part == DENOISER else self.text_encoder_loras).append(module)
        self._without_rate: set[int] = set()
        self._backup: dict[str, Tensor] = {}

    @property
    def loras(self) -> list[LoRAModule]:
        """Every adapter, text encoders first."""
        return self.text_encoder_loras + self.unet_loras

    # --- installing -------------------------------------------------------------------------------------------------

    def apply_to(
        self, text_encoder: Encoders, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Make the adapters part of the model's forward; parts that are not trained lose their adapters.

        Raises:
            UserError: no adapter is left.
        """
        del text_encoder, unet  # every adapter knows its layer
        if not apply_text_encoder:
            self.text_encoder_loras = []
        if not apply_unet:
            self.unet_loras = []
        if not self.loras:
            raise UserError(FLAG, message="no layer gets an adapter: the arguments and the trained parts leave none")
        for module in self.loras:
            module.apply_to()
            self.add_module(module.lora_name, module)
        logger.info(
            "adapters: %d in the text encoders, %d in the denoiser", len(self.text_encoder_loras), len(self.unet_loras)
        )

    def restore_forwards(self) -> None:
        """Detach the adapters; the model computes as before `apply_to`."""
        for module in reversed(self.loras):
            module.restore()

    remove = restore_forwards

    # --- weights ----------------------------------------------------------------------------------------------------

    def load_weights(self, file: str | os.PathLike[str]) -> Any:
        """Load an adapter file into the installed adapters; the scale follows the file's alpha.

        Returns:
            torch's record of missing and unexpected keys.

        Raises:
            CheckpointError: another kind of file, another rank, or unreadable.
        """
        weights, metadata = read_weights(file)
        check_native(weights, self.traits.prefixes, str(file))
        weights = restore_split_alphas(weights, metadata, self.traits.split_counts, str(file))
        check_fit(weights, {module.lora_name: module.lora_dim * module.num_parts for module in self.loras}, str(file))
        before = {module.lora_name: module.scale for module in self.loras}
        info = self.load_state_dict(weights, strict=False)
        if len(info.unexpected_keys) == len(weights):
            shown = ", ".join(list(weights)[:3])
            raise CheckpointError(str(file), message=f"fits no layer of this model ({shown}, ...); name another file")
        self._report_loading(str(file), info, before)
        return info

    def _report_loading(self, file: str, info: Any, before: Mapping[str, float]) -> None:
        if info.unexpected_keys:
            shown = ", ".join(info.unexpected_keys[:3])
            logger.warning("%s: %d keys have no place here: %s ...", file, len(info.unexpected_keys), shown)
        if info.missing_keys:
            logger.warning("%s: lacks %d keys: %s ...", file, len(info.missing_keys), ", ".join(info.missing_keys[:3]))
        changed = [module for module in self.loras if abs(module.scale - before[module.lora_name]) > 1e-6]
        if changed:
            logger.warning(
                "%s: alpha of the file is used instead of --network_alpha for %d modules (scale %.4g instead of %.4g)",
                file,
                len(changed),
                changed[0].scale,
                before[changed[0].lora_name],
            )

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the adapters to a file (safetensors, or torch's format for .pt and .ckpt)."""
        write_weights(file, self.state_dict(), dtype, metadata)

    # --- training ---------------------------------------------------------------------------------------------------

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None = None,
        unet_lr: float | None = None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and a label for each.

        Args:
            text_encoder_lr: one rate for all text encoders, or one per encoder.
            unet_lr: rate of the denoiser.
            default_lr: for parts without a rate of their own; a rate of 0 freezes a part.
        """
        encoder_rates = spread_text_encoder_rates(text_encoder_lr, self.traits.num_text_encoders)
        rates = LearningRates(text_encoders=encoder_rates, denoiser=unet_lr, default=default_lr)
        groups, labels = optimizer_groups(self._sections(rates), self.traits.rules)
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        self._without_rate = {id(parameter) for parameter in self.parameters()} - trained
        self._require_gradients()
        return groups, labels

    prepare_optimizer_params = prepare_optimizer_params_with_multiple_te_lrs

    def _sections(self, rates: LearningRates) -> list[Section]:
        sections = []
        several = self.traits.num_text_encoders > 1
        for index, rate in enumerate(rates.text_encoders):
            modules = [module for module in self.text_encoder_loras if module.part == f"text_encoder:{index}"]
            label = f"textencoder {index + 1}" if several else "textencoder"
            sections.append(Section(label=label, modules=modules, rate=_rate(rate, rates), kind="text_encoder"))
        denoiser = Section(label="unet", modules=self.unet_loras, rate=_rate(rates.denoiser, rates), kind=DENOISER)
        return [*sections, denoiser]

    def _require_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) not in self._without_rate)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: adapters are recomputed with the blocks they are in."""

    def prepare_grad_etc(self, text_encoder: Encoders, unet: nn.Module) -> None:
        """Make the trained parameters require gradients."""
        del text_encoder, unet
        self._require_gradients()

    def on_epoch_start(self, text_encoder: Encoders, unet: nn.Module) -> None:
        """Put the adapters into training mode (dropouts act)."""
        del text_encoder, unet
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Parameters that the optimizer changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """Set the strength: one number, or a tensor [B] with one per sample of the next batches."""
        self.multiplier = multiplier if isinstance(multiplier, Tensor) else float(multiplier)
        for module in self.loras:
            module.multiplier = self.multiplier

    # --- norms ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str
    ) -> tuple[int, float, float]:
        """Shrink every weight change whose Frobenius norm exceeds a limit.

        Returns:
            (how many were shrunk, mean norm, largest norm), norms after shrinking.
        """
        del device  # the factors are where they are trained
        modules = self.loras
        if not modules:
            return 0, 0.0, 0.0
        norms = torch.stack([module.squared_norm() for module in modules]).sqrt()
        bounded = norms.clamp(min=max_norm_value / 2)
        ratios = bounded.clamp(max=max_norm_value) / bounded
        for module, ratio, shrink in zip(modules, ratios, (ratios != 1).tolist()):
            if shrink:
                module.multiply_weight(ratio)
        kept = norms * ratios
        return int((ratios != 1).sum()), float(kept.mean()), float(kept.max())

    def _perturbed(self) -> list[GgpoLoRAModule]:
        return [module for module in self.loras if isinstance(module, GgpoLoRAModule)]

    def update_norms(self) -> None:
        """Refresh the weight statistics of GGPO; nothing without it."""
        for module in self._perturbed():
            module.update_norms()

    def update_grad_norms(self) -> None:
        """Refresh the gradient statistics of GGPO; nothing without it."""
        for module in self._perturbed():
            module.update_grad_norms()

    def weight_norms(self) -> Tensor | None:
        """Mean row norm of each weight change under GGPO, or None without it."""
        return _means(self._perturbed(), "weight_norms")

    def grad_norms(self) -> Tensor | None:
        """Mean row norm of each weight change's gradient under GGPO, or None without it."""
        return _means(self._perturbed(), "grad_norms")

    def combined_weight_norms(self) -> Tensor | None:
        """Mean of the combined row norms under GGPO, or None without it."""
        return _means(self._perturbed(), "combined_norms")

    # --- merging ----------------------------------------------------------------------------------------------------

    def is_mergeable(self) -> bool:
        """Whether `merge_to` can be used: always."""
        return True

    def merge_to(
        self,
        text_encoder: Encoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the adapters of a file to the model's weights, computed in float32 and rounded to `dtype`."""
        del text_encoder, unet
        for module in self.loras:
            change = stored_delta(weights_sd, module.lora_name, device)
            if change is not None:
                change = change * self.multiplier
                add_to_weight(module.base, change, name=module.lora_name, dtype=dtype, device=device)

    def backup_weights(self) -> None:
        """Keep a copy of the adapted layers' weights, once."""
        if not self._backup:
            self._backup = {module.lora_name: module.base.weight.detach().to("cpu", copy=True) for module in self.loras}

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put the kept weights back and let the adapters act in the forward again."""
        for module in self.loras:
            if module.lora_name in self._backup:
                module.base.weight.data.copy_(self._backup[module.lora_name])
            module.enabled = True

    def pre_calculation(self) -> None:
        """Add the loaded adapters to the weights and take them out of the forward."""
        for module in self.loras:
            add_to_weight(module.base, module.delta_weight() * self.multiplier, name=module.lora_name)
            module.enabled = False


def _adapter_class(adapter: type[LoRAModule], settings: AdapterSettings, target: Target) -> type[LoRAModule]:
    """GGPO perturbs linear layers of the denoiser; other layers keep the plain adapter."""
    wanted = settings.ggpo_sigma is not None and settings.ggpo_beta is not None
    return GgpoLoRAModule if wanted and adapter is LoRAModule and target.part == DENOISER else adapter


def _rate(own: float | None, rates: LearningRates) -> float | None:
    return own if own is not None else rates.default


def _means(modules: Sequence[GgpoLoRAModule], name: str) -> Tensor | None:
    return torch.stack([getattr(module, name).mean() for module in modules]) if modules else None
