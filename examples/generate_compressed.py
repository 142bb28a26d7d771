"""Generate text with `CompressedCache`, a drop-in replacement for `DynamicCache`.

python examples/generate_compressed.py               # a bundled model, offline, about a minute
python examples/generate_compressed.py Qwen/Qwen2.5-0.5B 131072
"""

import inspect
import sys
import textwrap

import eigencache

name = sys.argv[1] if len(sys.argv) > 1 else "ref-llama"
tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 16_384

codec = eigencache.fit(name, text="stdlib", tokens=tokens, live=True)
model, tokenizer = codec.loaded.model, codec.loaded.tokenizer

prompt = tokenizer(inspect.getsource(textwrap), return_tensors="pt", truncation=True, max_length=512)
cache = eigencache.CompressedCache(model, codec)
output = model.generate(**prompt, past_key_values=cache, max_new_tokens=32, do_sample=False)

print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))
print(f"{cache.get_seq_length()} tokens in {cache.nbytes:,} bytes, read by the backend {cache.backend}")
