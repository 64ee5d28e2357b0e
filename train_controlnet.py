"""Old name of train_control_net.py."""

from library.train_util import main
from train_control_net import FAMILY, TASK, setup_parser

__all__ = ["FAMILY", "TASK", "setup_parser"]

if __name__ == "__main__":
    main(FAMILY, TASK, renamed_to="train_control_net.py")
