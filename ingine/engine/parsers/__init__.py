"""What a model writes, as an OpenAI assistant message: content, reasoning and tool calls, piece by piece."""
