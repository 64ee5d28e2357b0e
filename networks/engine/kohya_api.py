"""The two entry points of a network module, bound to a table."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from library.base.errors import CheckpointError, UserError
from library.base.logs import logger
from networks.engine.arguments import FLAG, Arguments, parse_arguments
from networks.engine.modules import AdapterSettings, LoRAModule
from networks.engine.network import AdapterNetwork, Encoders, NetworkTraits
from networks.engine.param_groups import GroupRules, block_factors, block_ranks
from networks.engine.selection import ModelParts, Plan, Rank, Target, is_conv, select_targets, split_counts
from networks.engine.targets import DENOISER, BlockScheme, TargetTable
from networks.engine.weights import check_native, read_weights, restore_split_alphas, stored_ranks

DEFAULT_DIM = 4
DEFAULT_ALPHA = 1.0

CreateNetwork = Callable[..., AdapterNetwork]
CreateFromWeights = Callable[..., tuple[AdapterNetwork, dict[str, Tensor]]]


def bind(table: TargetTable, adapter: type[LoRAModule] = LoRAModule) -> tuple[CreateNetwork, CreateFromWeights]:
    """`create_network` and `create_network_from_weights` for a table.

    Args:
        table: which layers, names and arguments.
        adapter: class of the adapters.
    """

    def create_network(
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: Encoders,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> AdapterNetwork:
        """A new network.

        Args:
            multiplier: strength.
            network_dim: rank (4 when None).
            network_alpha: alpha (1 when None; 0 means the rank).
            vae: not used.
            text_encoder: a module, or a list for several encoders (None for an absent one).
            unet: the denoiser, under its published names.
            neuron_dropout: `--network_dropout`.
            **kwargs: `--network_args`, values as text.

        Raises:
            UserError: unknown or unreadable arguments, or none of the layers is chosen.
        """
        del vae
        return _Builder(table, adapter, text_encoder, unet, kwargs).create(
            multiplier, network_dim, network_alpha, neuron_dropout
        )

    def create_network_from_weights(
        multiplier: float,
        file: str | os.PathLike[str] | None,
        vae: nn.Module | None,
        text_encoder: Encoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> tuple[AdapterNetwork, dict[str, Tensor]]:
        """A network with the modules, ranks and alphas of a file, and the file's tensors (not yet loaded into it).

        Args:
            multiplier: strength.
            file: adapter file; not read when `weights_sd` is given.
            vae: not used.
            text_encoder: a module, or a list for several encoders (None for an absent one).
            unet: the denoiser, under its published names.
            weights_sd: tensors of a file that is already read.
            for_inference: leave every dropout out.
            **kwargs: `--network_args`, values as text.

        Raises:
            CheckpointError: not an adapter file of this family.
            UserError: unknown or unreadable arguments.
        """
        del vae
        builder = _Builder(table, adapter, text_encoder, unet, kwargs)
        return builder.create_from_weights(multiplier, file, weights_sd, for_inference)

    # lets a trainer find mistakes in --network_args before any model is loaded
    create_network.check_arguments = lambda given: parse_arguments(table.arguments, given)
    return create_network, create_network_from_weights


class _Builder:
    """One call of an entry point: its parts, arguments and block numbering."""

    def __init__(
        self,
        table: TargetTable,
        adapter: type[LoRAModule],
        text_encoder: Encoders,
        unet: nn.Module,
        given: Mapping[str, Any],
    ) -> None:
        self.table, self.adapter = table, adapter
        self.parts = ModelParts.of(text_encoder, unet)
        self.num_text_encoders = (
            len(text_encoder) if isinstance(text_encoder, (list, tuple)) else int(text_encoder is not None)
        )
        self.arguments: Arguments = parse_arguments(table.arguments, given)
        self.scheme: BlockScheme | None = next((s for s in table.schemes if hasattr(unet, s.marker)), None)
        self.factors = block_factors(self.scheme, self.arguments) if self.scheme else None

    def create(
        self, multiplier: float, dim: int | None, alpha: float | None, neuron_dropout: float | None
    ) -> AdapterNetwork:
        default = _default_rank(dim, alpha)
        conv_alpha = self.arguments.get("conv_alpha")
        conv = Rank(self.arguments.get("conv_dim") or 0, DEFAULT_ALPHA if conv_alpha is None else conv_alpha)
        blocks = block_ranks(self.scheme, self.arguments, default, conv, self.factors)
        plan = Plan(default=default, conv=conv, blocks=blocks, scheme=self.scheme)
        targets = select_targets(self.parts, self.table, self.arguments, plan)
        if not targets:
            raise UserError(FLAG, message="no layer of this model is chosen by these arguments")
        if conv.dim and not any(is_conv(target.module) for target in targets):
            logger.warning("%s conv_dim=%d: has no effect, this model has no convolutions to adapt", FLAG, conv.dim)
        return self._network(targets, default, self._settings(multiplier, neuron_dropout))

    def create_from_weights(
        self,
        multiplier: float,
        file: str | os.PathLike[str] | None,
        weights: Mapping[str, Tensor] | None,
        for_inference: bool,
    ) -> tuple[AdapterNetwork, dict[str, Tensor]]:
        metadata: Mapping[str, str] = {}
        source = str(file) if file else "the given weights"
        if weights is None:
            if file is None:
                raise UserError("--network_weights", message="no file is given")
            weights, metadata = read_weights(file)
        check_native(weights, self._prefixes(), source)
        weights = restore_split_alphas(dict(weights), metadata, split_counts(self.parts, self.table), source)
        stored = stored_ranks(weights, source)
        default = next(iter(stored.values()), Rank(DEFAULT_DIM, DEFAULT_ALPHA))
        plan = Plan(default=default, conv=Rank(0, 0), scheme=self.scheme, stored=stored)
        targets = select_targets(self.parts, self.table, self.arguments, plan)
        self._report(targets, stored, source)
        settings = AdapterSettings(multiplier=multiplier) if for_inference else self._settings(multiplier, None)
        return self._network(targets, default, settings), weights

    def _report(self, targets: list[Target], stored: Mapping[str, Rank], source: str) -> None:
        """Say which modules of a file this model has no layer for."""
        missing = sorted(set(stored) - {target.name for target in targets})
        if not missing:
            return
        absent = tuple(f"{prefix}_" for prefix in self._prefixes(absent=True))
        if not targets and not all(name.startswith(absent) for name in missing):
            raise CheckpointError(
                source,
                message=f"fits no layer of this model (its first modules: {', '.join(missing[:3])}); name another file",
            )
        logger.warning("%s: %d modules have no layer here: %s ...", source, len(missing), ", ".join(missing[:3]))

    def _prefixes(self, *, absent: bool = False) -> list[str]:
        """Key prefixes of all groups, or of those whose part is not loaded."""
        groups = [group for group in self.table.groups if not absent or group.part not in self.parts.modules]
        return [prefix for group in groups for prefix in (group.prefix, group.prefix_alone) if prefix]

    def _settings(self, multiplier: float, neuron_dropout: float | None) -> AdapterSettings:
        value = self.arguments.get
        return AdapterSettings(
            multiplier=multiplier,
            dropout=neuron_dropout if neuron_dropout is not None else value("dropout"),
            rank_dropout=value("rank_dropout"),
            module_dropout=value("module_dropout"),
            ggpo_sigma=value("ggpo_sigma"),
            ggpo_beta=value("ggpo_beta"),
        )

    def _network(self, targets: list[Target], default: Rank, settings: AdapterSettings) -> AdapterNetwork:
        if (settings.ggpo_sigma is None) != (settings.ggpo_beta is None):
            raise UserError(FLAG, message="ggpo_sigma and ggpo_beta are used together")
        if self.arguments.get("verbose"):
            for target in targets:
                logger.info("adapter %s: rank %d, alpha %g", target.name, target.rank.dim, target.rank.alpha)
        if not any(target.part == DENOISER for target in targets):
            logger.info("no adapter in the denoiser")
        traits = NetworkTraits(
            dim=default.dim,
            alpha=default.alpha,
            num_text_encoders=self.num_text_encoders,
            prefixes=self._prefixes(),
            split_counts=split_counts(self.parts, self.table),
            rules=GroupRules.of(self.arguments, self.factors, self.table.matches),
            train_t5xxl=bool(self.arguments.get("train_t5xxl")) or any(t.name.startswith("lora_te3_") for t in targets),
        )
        return AdapterNetwork(targets, traits, settings=settings, adapter=self.adapter)


def _default_rank(dim: int | None, alpha: float | None) -> Rank:
    if dim is not None and int(dim) < 1:
        raise UserError("--network_dim", dim, "expected a rank of 1 or more")
    rank = DEFAULT_DIM if dim is None else int(dim)
    value = DEFAULT_ALPHA if alpha is None else float(alpha)
    return Rank(rank, value or float(rank))
