"""Fit the codec `eigen`, turn the cache of a text into bytes, and decode a part of it.

python examples/encode_cache.py                      # a bundled model, offline, about a minute
python examples/encode_cache.py Qwen/Qwen2.5-0.5B 131072
"""

import inspect
import sys
import textwrap

import torch

import eigencache

name = sys.argv[1] if len(sys.argv) > 1 else "ref-llama"
tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 16_384

codec = eigencache.fit(name, text="stdlib", bits=0.5, tokens=tokens)
codec.save("codec")  # later: eigencache.CacheCodec.load("codec", name)

model, tokenizer = codec.loaded.model, codec.loaded.tokenizer
inputs = tokenizer(inspect.getsource(textwrap), return_tensors="pt", truncation=True, max_length=512)
with torch.no_grad():
    cache = model(**inputs, use_cache=True).past_key_values

container = codec.encode(cache)
numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
print(f"{cache.get_seq_length()} tokens: {2 * numbers:,} bytes in 16 bits, {len(container):,} bytes encoded")

part = codec.decode(container, tokens=slice(128, 256))  # reads only the blocks that it needs
print(f"decoded {part.layers[0].keys.shape[-2]} tokens as a {type(part).__name__}")
