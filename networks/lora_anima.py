"""LoRA for Anima."""

import ast
import re
from collections.abc import Callable, Sequence

from networks.engine.arguments import (
    COMMON_ARGUMENTS,
    Argument,
    Arguments,
    parse_bool,
    parse_float,
    parse_int,
    parse_regex_map,
)
from networks.engine.kohya_api import bind
from networks.engine.modules import LoRAModule
from networks.engine.network import AdapterNetwork
from networks.engine.targets import DENOISER, TargetGroup, TargetTable, whole_path

QWEN3_CLASSES = ("Qwen3Attention", "Qwen3SdpaAttention", "Qwen3FlashAttention2", "Qwen3MLP")
# modulation, norms, embedders and the last layer get adapters only where `include_patterns` names them
ALWAYS_EXCLUDED = re.compile(r".*(_modulation|_norm|_embedder|final_layer).*")


def parse_patterns(text: str) -> tuple[re.Pattern[str], ...]:
    """Regular expressions: one, or a Python list of quoted ones."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    texts = value if isinstance(value, (list, tuple)) else [value]
    patterns = []
    for one in texts:
        if not isinstance(one, str):
            raise ValueError(f"a list of quoted regular expressions instead of {one!r}")
        try:
            patterns.append(re.compile(one))
        except re.error as error:
            raise ValueError(f"a valid regular expression instead of {one!r} ({error})") from error
    return tuple(patterns)


ANIMA_ARGUMENTS = (
    Argument(name="train_llm_adapter", parse=parse_bool, default=False, help="adapt the text adapter too"),
    Argument(
        name="exclude_patterns", parse=parse_patterns, default=(), help="leave out layers whose whole path matches"
    ),
    Argument(
        name="include_patterns", parse=parse_patterns, default=(), help="take layers back whose whole path matches"
    ),
    Argument(name="network_reg_dims", parse=parse_regex_map(parse_int), help="rank by whole path: regex=int,..."),
    Argument(name="network_reg_lrs", parse=parse_regex_map(parse_float), help="rate by whole path: regex=float,..."),
    Argument(name="verbose", parse=parse_bool, default=False, help="log every adapted layer"),
)


def select_layers(arguments: Arguments, paths: Sequence[str]) -> Callable[[str], bool]:
    """Layers that no exclusion matches, or that an inclusion takes back."""
    del paths
    excluded = (*arguments["exclude_patterns"], ALWAYS_EXCLUDED)
    included = arguments["include_patterns"]

    def accepts(path: str) -> bool:
        out = any(pattern.fullmatch(path) for pattern in excluded)
        return not out or any(pattern.fullmatch(path) for pattern in included)

    return accepts


TABLE = TargetTable(
    family="anima",
    groups=(
        TargetGroup(prefix="lora_te", part="text_encoder:0", classes=QWEN3_CLASSES),
        TargetGroup(
            prefix="lora_unet", part=DENOISER, classes=("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer")
        ),
        TargetGroup(
            prefix="lora_unet", part=DENOISER, classes=("LLMAdapterTransformerBlock",), needs="train_llm_adapter"
        ),
    ),
    arguments=COMMON_ARGUMENTS + ANIMA_ARGUMENTS,
    select=select_layers,
    selects_text=True,
    matches=whole_path,
)

LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
create_network, create_network_from_weights = bind(TABLE)

__all__ = ["TABLE", "LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]
