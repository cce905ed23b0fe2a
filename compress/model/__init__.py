"""All that knows Hugging Face: architectures, checkpoints, loading."""
