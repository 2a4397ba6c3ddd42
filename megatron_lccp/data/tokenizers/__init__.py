"""Text <-> token ids: sentencepiece, Hugging Face's `tokenizers`, tiktoken."""
