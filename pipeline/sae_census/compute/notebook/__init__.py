"""What notebooks ask of prompts: observation, subsamples, several layers at once."""
