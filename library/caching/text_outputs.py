"""Encode all captions once, before training."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from tqdm import tqdm

from library.batch import Conditioning

C = TypeVar("C", bound=Conditioning)


def cache_text_outputs(
    captions: Iterable[str], encode: Callable[[list[str]], C], *, batch_size: int, show_progress: bool = True
) -> dict[str, C]:
    """Conditioning of every distinct caption, in CPU memory.

    Args:
        captions: texts as the model will see them.
        encode: texts -> conditioning of the batch.
        batch_size: captions per call.
        show_progress: draw a progress bar.

    Returns:
        caption -> conditioning of one sample.
    """
    texts = sorted(set(captions))
    cpu = torch.device("cpu")
    cached: dict[str, C] = {}
    bar = tqdm(total=len(texts), desc="caching text encoder outputs", unit="caption", disable=not show_progress)
    with bar, torch.no_grad():
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            encoded = encode(chunk).to(cpu)
            for index, text in enumerate(chunk):
                cached[text] = encoded.item(index)
            bar.update(len(chunk))
    return cached
