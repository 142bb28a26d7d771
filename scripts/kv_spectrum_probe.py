"""Write the spectra of keys and values of one model as JSON and as a plot (docs/history/first-numbers.md).

    python scripts/kv_spectrum_probe.py --model ref-llama --output out.json --plot out.png --layers 0,3,6

This is a short form of `eigencache probe MODEL --view classic`: the original table, then one from enough data.
"""

import argparse

from eigencache.cli.app import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="bundled name, folder, GGUF file or hub name")
parser.add_argument("--output", default="kv_spectrum.json", help="JSON file of the results; default: kv_spectrum.json")
parser.add_argument("--plot", default="kv_spectrum.png", help="file of the plot; default: kv_spectrum.png")
parser.add_argument("--layers", help="layer indices such as 0,6,12,18,23; default: all")
args = parser.parse_args()
layers = ["--layers", args.layers] if args.layers else []
main(["probe", args.model, "--view", "classic", "--output", args.output, "--plot", args.plot, *layers])
