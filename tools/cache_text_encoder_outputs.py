"""Encode all captions of a dataset into files beside the images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere, as the scripts do

from library.train_util import cache_main, cache_parser


def setup_parser():
    """The tool's flags."""
    return cache_parser()


if __name__ == "__main__":
    cache_main(texts=True)
