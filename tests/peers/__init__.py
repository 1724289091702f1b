"""Other broadcast servers, of a few lines each, for the benchmark: what a client sends, all get."""
