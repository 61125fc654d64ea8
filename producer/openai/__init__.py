"""OpenAI's file formats and request bodies."""
