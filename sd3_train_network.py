"""Train an adapter on Stable Diffusion 3 or 3.5."""

import argparse

from library.train_util import main, make_parser

FAMILY, TASK = "sd3", "network"


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_parser(FAMILY, TASK)


if __name__ == "__main__":
    main(FAMILY, TASK)
