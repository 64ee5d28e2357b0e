"""Adapter files under the names of other programs.

Ours have kohya's names: `<prefix>_<layer path with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

- `comfy`: `<start>.<layer path>.lora_A.weight`, `.lora_B.weight`, `.alpha`, the names of ComfyUI's own model tree;
- `diffusers`: `<component>.<layer path in diffusers>.lora_A.weight`, `.lora_B.weight`, as PEFT names them. There is no
  alpha: lora_B is scaled by alpha / rank. Layers that diffusers splits have their rows of lora_B apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.logs import logger
from library.base.safetensors_io import TensorFile, save_file_atomic
from library.checkpoint.saver import dialect_path
from library.family import ExportPart
from library.modules.components import Components, Variant
from library.modules.layer_names import LayerRule, find_rule, layer_parts

FLAG = "--save_also_as"
_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


@dataclass(frozen=True)
class Layer:
    """A layer that adapters change: its published path, its path in its own module, and its model part."""

    published: str
    own: str
    part: ExportPart


@dataclass(frozen=True)
class Low:
    """The two factors of one adapter.

    Attributes:
        down: [r, I] or [r, I, k, k].
        up: [O, r] or [O, r, 1, 1].
        scale: alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float


class Exporter:
    """Writes adapter files in other dialects.

    Args:
        parts: what the family says of its model's parts.
        components: the loaded model.
    """

    def __init__(self, parts: Sequence[ExportPart], components: Components) -> None:
        self.layers = {name: layer for part in parts for name, layer in _layers(part, components)}
        self.rules = {part: _rules(part.layers, components.variant) for part in parts}
        self.comfy_rules = {part: _rules(part.comfy_layers, components.variant) for part in parts}

    def export(self, source: Path, dialects: Sequence[str]) -> list[Path]:
        """Write an adapter file in dialects, and read what was written back.

        Args:
            source: the adapter file.
            dialects: `comfy`, `diffusers`.

        Returns:
            The new files.

        Raises:
            UserError: an adapter that a dialect cannot say, or a file that does not hold what was written.
        """
        file = TensorFile(source)
        state = {name: file.tensor(name) for name in file.names}
        kept = {key: text for key, text in file.metadata.items() if not key.startswith("sshs_")}
        written = []
        for dialect in dialects:
            target, tensors = dialect_path(source, dialect), self.convert(state, dialect)
            save_file_atomic(tensors, target, {**kept, "ss_dialect": dialect})
            _check(target, tensors)
            written.append(target)
        return written

    def check(self, state: Mapping[str, Tensor], dialects: Sequence[str]) -> None:
        """Stop before training when a network cannot be written in a dialect.

        Raises:
            UserError: which layer or kind of adapter cannot be.
        """
        shapes = {name: tensor if name.endswith(_ALPHA) else tensor.to("meta") for name, tensor in state.items()}
        for dialect in dialects:
            self.convert(shapes, dialect)

    def convert(self, state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
        """Tensors of an adapter file under a dialect's names.

        Raises:
            UserError: see `export`.
        """
        found: dict[str, Tensor] = {}
        skipped: set[str] = set()
        for name, low in _factors(state, dialect):
            layer = self.layers.get(name)
            if layer is None:
                raise UserError(FLAG, dialect, f"no layer of this model belongs to {name!r}")
            if dialect == "comfy":
                found |= self._comfy(layer, low, name)
            elif layer.part.diffusers is None:
                skipped.add(layer.part.prefixes[0])
            else:
                found |= self._diffusers(layer, low)
        for prefix in sorted(skipped):
            logger.warning("%s %s: leaves out %s, of which diffusers reads no adapters", FLAG, dialect, prefix)
        return found

    def _comfy(self, layer: Layer, low: Low, name: str) -> dict[str, Tensor]:
        alpha = torch.tensor(low.scale * low.down.shape[0])
        if layer.part.comfy is None:
            return {f"{name}.{_DOWN}": low.down, f"{name}.{_UP}": low.up, f"{name}.{_ALPHA}": alpha}
        rule = find_rule(self.comfy_rules[layer.part], layer.published)
        path = f"{layer.part.comfy}.{layer.published if rule is None else rule[1][0]}"
        return {f"{path}.lora_A.weight": low.down, f"{path}.lora_B.weight": low.up, f"{path}.{_ALPHA}": alpha}

    def _diffusers(self, layer: Layer, low: Low) -> dict[str, Tensor]:
        up = (low.up.float() * low.scale).to(low.up.dtype)
        rules = self.rules[layer.part]
        component, down = layer.part.diffusers, low.down
        if not rules:
            return {f"{component}.{layer.own}.lora_A.weight": down, f"{component}.{layer.own}.lora_B.weight": up}
        found = find_rule(rules, layer.published)
        if found is None:
            raise UserError(FLAG, "diffusers", f"diffusers has no layer like {layer.published}")
        rule, names = found
        if rule.flat:
            down, up = down.flatten(1), up.flatten(1)
        result = {}
        for path, rows in zip(names, layer_parts(rule, up, down.shape[1]), strict=True):
            start = f"{rule.component or component}.{path}"
            result[f"{start}.lora_A.weight"], result[f"{start}.lora_B.weight"] = down.clone(), rows.contiguous()
        return result


def _rules(reference: Any, variant: Variant) -> tuple[LayerRule, ...]:
    """A table of rules, or what a function makes of the variant."""
    if reference is None:
        return ()
    table = resolve(reference)
    return tuple(table(variant) if callable(table) else table)


def _layers(part: ExportPart, components: Components) -> Iterator[tuple[str, Layer]]:
    """(name in adapter files, layer) of a model part; a text encoder that is not loaded has none."""
    if part.part == "denoiser":
        published, own = components.published_denoiser, components.denoiser
    else:
        index = int(part.part.partition(":")[2])
        published, own = components.published_text_encoders[index], components.text_encoders[index]
    if published is None or own is None:
        return
    paths = {id(module): path for path, module in own.named_modules()}
    for path, module in published.named_modules():
        if isinstance(module, nn.Module) and not list(module.children()):
            layer = Layer(path, path if part.published_names else paths.get(id(module), path), part)
            for prefix in part.prefixes:
                yield f"{prefix}_{path.replace('.', '_')}", layer


def _factors(state: Mapping[str, Tensor], dialect: str) -> Iterator[tuple[str, Low]]:
    """(name, factors) of every adapter in a file."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, leaf = key.partition(".")
        layers.setdefault(name, {})[leaf] = tensor
    for name, own in layers.items():
        if not {_DOWN, _UP} <= set(own) <= {_DOWN, _UP, _ALPHA}:
            message = f"only LoRA files can be written so; {name} holds {', '.join(sorted(own))}"
            raise UserError(FLAG, dialect, message)
        rank = own[_DOWN].shape[0]
        alpha = float(own[_ALPHA]) if _ALPHA in own else float(rank)
        yield name, Low(own[_DOWN], own[_UP], alpha / rank)


def _check(path: Path, expected: Mapping[str, Tensor]) -> None:
    """The file holds what was to be written."""
    file = TensorFile(path)
    same = set(file.names) == set(expected)
    if not same or not all(torch.equal(file.tensor(name), tensor.cpu()) for name, tensor in expected.items()):
        raise UserError(str(path), message="does not hold what was written; check the disk")
