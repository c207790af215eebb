"""``wsiengine train``: a model from your own labels, ready for ``--model``."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a JSON file, or `default`")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="labels.csv, or a folder per class")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the model's folder")


def run(args: argparse.Namespace) -> int:
    from wsiengine.training import run as train

    folder = train(args.recipe, args.data, args.output)
    print(f"model  {folder}: `wsiengine infer SLIDE --model {folder}`")
    return 0
