"""Make an image with HunyuanImage 2.1."""

import argparse

from library.inference import main, make_inference_parser


def setup_parser() -> argparse.ArgumentParser:
    """Parser of this script, for tools that want its flags."""
    return make_inference_parser("hunyuan_image")


if __name__ == "__main__":
    main("hunyuan_image")
