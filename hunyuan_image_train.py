"""Train the whole of HunyuanImage 2.1."""

import argparse

from library.train_util import main, make_parser

FAMILY, TASK = "hunyuan_image", "full"


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_parser(FAMILY, TASK)


if __name__ == "__main__":
    main(FAMILY, TASK)
