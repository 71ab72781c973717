"""Models that leave for Hugging Face's ``transformers`` and come back."""
