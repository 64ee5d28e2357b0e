"""The line that shows how far sample images are: over prompts and denoising steps."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from library.base.logs import logger
from library.sampling.prompts import SampleRequest

_SELDOM = 5.0  # seconds between lines in a file or a pipe


class SampleProgress:
    """Counts denoising steps of several images; used as a context, which takes the line away at its end.

    Args:
        requests: what will be made.
        title: what stands before the line.
        show: whether to draw it.
        stream: where; stderr when None.
    """

    def __init__(
        self, requests: Sequence[SampleRequest], title: str, *, show: bool = True, stream: TextIO | None = None
    ) -> None:
        self.requests = list(requests)
        self.title = title
        stream = stream or sys.stderr
        terminal = stream.isatty()
        self._started = time.monotonic()
        self._begun = 0
        self._step = 0.0
        self._bar = tqdm(
            total=sum(request.steps for request in requests),
            desc=title,
            file=stream,
            leave=False,
            disable=not show,
            dynamic_ncols=True,
            delay=0 if terminal else _SELDOM,
            mininterval=0.1 if terminal else _SELDOM,
            bar_format="{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]",
        )

    def __enter__(self) -> "SampleProgress":
        """Counting begins."""
        return self

    def __exit__(self, *error: object) -> None:
        """The line goes."""
        self._bar.close()

    def begin(self, request: SampleRequest) -> None:
        """The next image is being made."""
        self._begun += 1
        self._steps, self._step = request.steps, 0.0
        self._show()

    def tick(self, share: float) -> None:
        """A share of the image's steps is done."""
        self._step += share * self._steps
        self._bar.update(share * self._steps)
        self._show()

    def _show(self) -> None:
        text = f"image {self._begun} of {len(self.requests)}, step {round(self._step)} of {self._steps}"
        self._bar.set_postfix_str(text, refresh=False)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started


@contextmanager
def above_lines() -> Iterator[None]:
    """Messages inside stand above the progress lines of a terminal."""
    if sys.stderr.isatty():
        with tqdm.external_write_mode(file=sys.stderr):
            yield
    else:
        yield


def say(text: str, *arguments: object) -> None:
    """A message above the progress lines."""
    with above_lines():
        logger.info(text, *arguments)
