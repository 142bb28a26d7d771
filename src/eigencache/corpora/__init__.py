"""Where text comes from: every corpus has a name, a hash and counts.

`text.read_text` turns `--text SPEC` into documents, `sequences.pack` turns documents into token sequences,
`contexts.distinct_contexts` counts how much of them is new. A source kind is one file of this folder that
registers itself: with `text.corpus` (a name such as `stdlib`) or with `files.file_format` (a suffix).
"""
