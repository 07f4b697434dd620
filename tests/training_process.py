"""`oneplusn train` as a process: `python -P training_process.py CONFIG.yaml [flags]`."""

from __future__ import annotations

import argparse
import sys

import torch

from oneplusn.adapters.training import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    cli.declare(parser)
    sys.exit(cli.run(parser.parse_args()))
