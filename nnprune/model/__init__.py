"""The only code that knows Hugging Face models and their files."""
