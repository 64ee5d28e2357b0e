"""Where the text conditioning of a batch comes from."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from library.batch import Conditioning
from library.strategy_base import Strategies


def encode_with_all(
    strategies: Strategies,
    encoders: Sequence[nn.Module | None],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Callable[[list[str]], Conditioning]:
    """Texts -> conditioning by all loaded encoders, as caches hold it."""
    source = ConditioningSource(strategies, encoders, [False] * len(encoders), None, device, autocast)
    return lambda texts: source.encode(texts, encoders)


class ConditioningSource:
    """Conditioning of captions: cached, encoded now, or both where only some encoders are trained.

    Args:
        strategies: of the family.
        encoders: loaded text encoders, None where one is absent.
        trained: which of them an adapter changes.
        cached: caption -> conditioning with the outputs of the untrained encoders, or None.
        prompts: (prompt of a sample image, whether it is a negative one) -> the same; they may be longer and weighted.
        device: where conditioning is needed.
        autocast: makes the context the encoders run in.
    """

    def __init__(
        self,
        strategies: Strategies,
        encoders: Sequence[nn.Module | None],
        trained: Sequence[bool],
        cached: Mapping[str, Conditioning] | None,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]],
        prompts: Mapping[tuple[str, bool], Conditioning] | None = None,
    ) -> None:
        self.strategies = strategies
        self.encoders = list(encoders)
        self.trained = list(trained)
        self.cached = cached
        self.device = device
        self.autocast = autocast
        self.prompts = prompts

    def encode(self, captions: Sequence[str], encoders: Sequence[nn.Module | None]) -> Conditioning:
        """Run the given encoders; grad mode is the caller's."""
        return self._encode(self.strategies.tokenize.tokenize(captions), encoders)

    def _encode(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> Conditioning:
        with self.autocast():
            return self.strategies.text_encoding.encode_tokens(tokens, encoders).to(self.device)

    def get(self, captions: Sequence[str], found: Conditioning | None = None) -> Conditioning:
        """Conditioning of a batch; with gradients for trained encoders only.

        Args:
            captions: texts of the batch.
            found: what was read from cache files with the batch.
        """
        live = [encoder if on else None for encoder, on in zip(self.encoders, self.trained)]
        if found is not None:
            found = found.to(self.device)
        elif self.cached is not None:
            found = self.strategies.conditioning.collate([self.cached[caption] for caption in captions]).to(self.device)
        else:
            rest = [None if on else encoder for encoder, on in zip(self.encoders, self.trained)]
            if not any(self.trained):
                with torch.no_grad():
                    return self.encode(captions, rest)
            with torch.no_grad():
                found = self.encode(captions, rest)
        return found.merged(self.encode(captions, live)) if any(self.trained) else found

    def for_prompt(self, prompt: str, *, negative: bool = False, beside: Sequence[str] = ()) -> Conditioning:
        """Conditioning of a sample prompt, or of what the image is not to show, without gradients.

        Args:
            prompt: the text.
            negative: whether it says what the image is not to show.
            beside: what other encoders read of the same image.
        """
        tokenize = self.strategies.tokenize
        with torch.no_grad():
            tokens = tokenize.tokenize_negative(prompt) if negative else tokenize.tokenize_beside(prompt, beside)
            if self.prompts is None:
                return self._encode(tokens, self.encoders)
            found = self.prompts[prompt, negative].to(self.device)
            if not any(self.trained):
                return found
            live = [encoder if on else None for encoder, on in zip(self.encoders, self.trained)]
            return found.merged(self._encode(tokens, live))
