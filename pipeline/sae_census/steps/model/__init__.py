"""Model, tokenizer and SAEs as a worker loads them, proved to be those that were planned with."""
