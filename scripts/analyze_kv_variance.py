"""Show the spread of keys and values and their ratio, per layer and overall, with a plot (docs/history/first-numbers.md).

    python scripts/analyze_kv_variance.py --model ref-llama

This is a short form of `eigencache probe MODEL --view spread --plot kv_variance_MODEL.png`.
"""

import argparse
from pathlib import Path

from eigencache.cli.app import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="bundled name, folder, GGUF file or hub name")
parser.add_argument("--plot", help="file of the plot; default: kv_variance_MODEL.png")
args = parser.parse_args()
main(["probe", args.model, "--view", "spread", "--plot", args.plot or f"kv_variance_{Path(args.model).name}.png"])
