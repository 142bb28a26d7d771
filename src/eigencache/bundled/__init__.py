"""The four reference models, in ordinary Hugging Face format, one folder each."""
