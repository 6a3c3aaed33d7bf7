"""The tokenizer: ids, texts of tokens, and the digest of its rules."""
