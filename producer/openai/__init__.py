"""OpenAI's formats of files and request bodies."""
