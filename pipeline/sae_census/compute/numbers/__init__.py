"""What a feature's numbers are made of: codes, the SAE that makes them, exact sums, samples, scores, logits."""
