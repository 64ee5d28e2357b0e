"""A model under its published names: a tree of containers over the same layers.

Adapters, per-block rates and checkpoint layouts are defined on published module paths and class names. Where a
library's module tree differs (diffusers' SDXL U-Net, transformers' CLIP), the view carries the published ones; its
leaves are the same module objects, so whatever is done to them shows in the model's own forward.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

Layout = Literal["own", "diffusers", "sgm", "clip"]

_RESNET_NAMES = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)


class PublishedContainer(nn.Module):
    """A module without parameters of its own: a name in the published tree.

    The root answers for what the model itself would (`dtype`, `device`, `config`, ...) through `source`. A container
    has no forward: the model's own computes.
    """

    def __init__(self, source: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__["source"] = source  # past nn.Module's registration: the model is not a child of its view

    def __getattr__(self, name: str) -> Any:
        """Children first, then the model's own attributes; not its submodules, which have other names here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = self.__dict__.get("source")
            if source is None or name.startswith("__") or name in source._modules:
                raise
            return getattr(source, name)

    def train(self, mode: bool = True) -> "PublishedContainer":
        """Set the training mode of the layers and of the model itself."""
        super().train(mode)
        if self.__dict__["source"] is not None:
            self.__dict__["source"].train(mode)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the first parameter."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device


def _container(class_name: str, source: nn.Module | None = None) -> PublishedContainer:
    """An empty container whose class has the given name: tools choose modules by class name."""
    return type(class_name, (PublishedContainer,), {})(source)


def published_view(module: nn.Module, layout: Layout) -> nn.Module:
    """The module under its published names.

    Args:
        module: a model.
        layout: "own": names are right as they are; "diffusers": a U-Net whose own names are the published ones (SD 1.x,
            2.x), but for the class name of its time embedding; "sgm": a diffusers U-Net under the names of the original
            checkpoints (`input_blocks`, `middle_block`, `output_blocks`); "clip": a CLIP text encoder under
            `text_model.`.

    Returns:
        A view, or the module itself where nothing has to change.
    """
    if layout == "sgm":
        return _sgm_view(module)
    if layout == "diffusers":
        return _diffusers_view(module)
    if layout == "clip" and not hasattr(module, "text_model"):
        root = _container(type(module).__name__, module)
        root.add_module("text_model", module)
        return root
    return module


def published_module_paths(module: nn.Module, layout: Layout) -> dict[str, str]:
    """Own module path -> published path, of every module that appears in the view."""
    view = published_view(module, layout)
    published = {id(child): path for path, child in view.named_modules()}
    if view is not module and layout == "clip":
        published[id(module)] = "text_model"
    return {path: published[id(child)] for path, child in module.named_modules() if id(child) in published}


def published_state_names(module: nn.Module, layout: Layout) -> dict[str, str]:
    """Own name -> published name, for every entry of the module's `state_dict`."""
    paths = published_module_paths(module, layout)
    names = {}
    for name in module.state_dict():
        path, _, leaf = name.rpartition(".")
        names[name] = f"{paths[path]}.{leaf}" if paths[path] else leaf
    return names


def _diffusers_view(unet: nn.Module) -> nn.Module:
    """A U-Net under its own names; the time embedding is a plain container.

    LyCORIS 4.1 targets its two layers by name and, meant for another family, by the class name TimestepEmbedding: with
    both it stops at duplicate key names.
    """
    root = _container(type(unet).__name__, unet)
    for name, child in unet.named_children():
        if type(child).__name__ == "TimestepEmbedding":
            plain = _container("Sequential")
            for inner_name, inner in child.named_children():
                plain.add_module(inner_name, inner)
            child = plain
        root.add_module(name, child)
    return root


def _put(root: nn.Module, path: str, module: nn.Module, classes: Mapping[str, str]) -> None:
    """Attach a module at a dotted path, making containers on the way (class name by path, else "ModuleList")."""
    *parents, leaf = path.split(".")
    for depth, part in enumerate(parents, 1):
        if part not in root._modules:
            here = ".".join(parents[:depth])
            root.add_module(part, _container(classes.get(here, "ModuleList")))
        root = root._modules[part]
    root.add_module(leaf, module)


def _sgm_view(unet: nn.Module) -> nn.Module:
    """A diffusers U-Net under the names of Stability's original code (table in the key map of the checkpoints)."""
    root = _container(type(unet).__name__, unet)
    for path, module, classes in _sgm_entries(unet):
        _put(root, path, module, classes)
    return root


_Entry = tuple[str, nn.Module, Mapping[str, str]]


def _sgm_entries(unet: nn.Module) -> Iterator[_Entry]:
    yield from _mlp("time_embed", unet.time_embedding, {})
    if getattr(unet, "add_embedding", None) is not None:
        yield from _mlp("label_emb.0", unet.add_embedding, {"label_emb": "Sequential"})
    yield "input_blocks.0.0", unet.conv_in, {"input_blocks.0": "ModuleList"}
    number = 0
    for block in unet.down_blocks:
        for index, resnet in enumerate(block.resnets):
            number += 1
            yield from _level(f"input_blocks.{number}", resnet, _at(block, "attentions", index))
        for sampler in getattr(block, "downsamplers", None) or ():
            number += 1
            yield f"input_blocks.{number}.0.op", sampler.conv, {f"input_blocks.{number}.0": type(sampler).__name__}
    yield from _resnet("middle_block.0", unet.mid_block.resnets[0])
    yield "middle_block.1", unet.mid_block.attentions[0], {}
    yield from _resnet("middle_block.2", unet.mid_block.resnets[1])
    number = 0
    for block in unet.up_blocks:
        samplers = list(getattr(block, "upsamplers", None) or ())
        for index, resnet in enumerate(block.resnets):
            attention = _at(block, "attentions", index)
            yield from _level(f"output_blocks.{number}", resnet, attention)
            if samplers and index == len(block.resnets) - 1:
                yield f"output_blocks.{number}.{1 if attention is None else 2}", samplers[0], {}
            number += 1
    yield "out.0", unet.conv_norm_out, {"out": "Sequential"}
    yield "out.2", unet.conv_out, {}


def _at(block: nn.Module, name: str, index: int) -> nn.Module | None:
    modules = getattr(block, name, None)
    return modules[index] if modules is not None else None


def _mlp(path: str, embedding: nn.Module, classes: Mapping[str, str]) -> Iterator[_Entry]:
    """Two linear layers with an activation between them, published as a plain Sequential."""
    kinds = {**classes, path: "Sequential"}
    yield f"{path}.0", embedding.linear_1, kinds
    yield f"{path}.2", embedding.linear_2, kinds


def _level(path: str, resnet: nn.Module, attention: nn.Module | None) -> Iterator[_Entry]:
    yield from _resnet(f"{path}.0", resnet)
    if attention is not None:
        yield f"{path}.1", attention, {}


def _resnet(path: str, resnet: nn.Module) -> Iterator[_Entry]:
    sequences = {f"{path}.{name}": "Sequential" for name in ("in_layers", "emb_layers", "out_layers")}
    for published, own in _RESNET_NAMES:
        module = getattr(resnet, own, None)
        if module is not None:
            yield f"{path}.{published}", module, {path: type(resnet).__name__, **sequences}
