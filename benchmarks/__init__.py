"""Time, memory and perplexity of nnprune beside other programs, on the same model, token ids, method and pattern."""
