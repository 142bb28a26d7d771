"""Show the spread of the latent, the rotary key, and the expanded keys and values (docs/history/first-numbers.md).

    python scripts/analyze_mla_kv_structure.py --model ref-deepseek

This is a short form of `eigencache probe MODEL --view spread --plot mla_structure_MODEL.png`. For a model without
MLA it shows keys and values.
"""

import argparse
from pathlib import Path

from eigencache.cli.app import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="bundled name, folder, GGUF file or hub name")
parser.add_argument("--plot", help="file of the plot; default: mla_structure_MODEL.png")
args = parser.parse_args()
main(["probe", args.model, "--view", "spread", "--plot", args.plot or f"mla_structure_{Path(args.model).name}.png"])
