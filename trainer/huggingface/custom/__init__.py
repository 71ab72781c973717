"""The code that an exported model brings along where ``transformers`` has none for it."""
