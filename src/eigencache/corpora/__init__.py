"""Corpora: every text has a name, a content hash and counts.

`resolve.read_text` reads the text of a specification as documents, `sequences.pack` cuts documents into token sequences,
and `contexts.distinct_contexts` counts their distinct contexts. A new source is one file of this folder. It registers
itself with `text.corpus` (a name such as `stdlib`) or with `files.file_format` (a suffix).
"""
