"""Historic entry point: spread of latent, rotary key, expanded keys and values, and what the equalization is worth.

    python scripts/analyze_mla_kv_structure.py --model ref-deepseek

The same as `eigencache probe MODEL --view spread --plot mla_structure_MODEL.png`; of a model without MLA it shows
keys and values.
"""

import argparse
from pathlib import Path

from eigencache.cli.app import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--plot", help="default: mla_structure_MODEL.png")
args = parser.parse_args()
main(["probe", args.model, "--view", "spread", "--plot", args.plot or f"mla_structure_{Path(args.model).name}.png"])
