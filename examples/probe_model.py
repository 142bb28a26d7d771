"""Measure the spectra of a model's KV cache.

python examples/probe_model.py                       # a bundled model, offline, a few seconds
python examples/probe_model.py Qwen/Qwen2.5-0.5B 131072
"""

import sys

import eigencache

name = sys.argv[1] if len(sys.argv) > 1 else "ref-llama"
tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 16_384

probe = eigencache.probe(name, text="stdlib", tokens=tokens)

print("layer  rank of keys  rank of values  held-out energy of values in 16 directions")
for values in probe.record.select("values", scope="layer"):
    keys = probe.layer(values.layer_idx).keys  # before rotation
    ranks = f"{keys.effective_rank:12.1f}  {values.effective_rank:14.1f}"
    print(f"{values.layer_idx:5}  {ranks}  {values.held_out_energy[16]:.3f}")

for warning in probe.warnings:  # what the sample was too small for
    print("warning:", warning)
probe.save("probe.json")  # `eigencache compare probe.json other.json` compares models
