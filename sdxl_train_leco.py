"""Train an adapter on Stable Diffusion XL from prompts alone."""

import argparse

from library.train_util import main, make_parser

FAMILY, TASK = "sdxl", "leco"


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_parser(FAMILY, TASK)


if __name__ == "__main__":
    main(FAMILY, TASK)
