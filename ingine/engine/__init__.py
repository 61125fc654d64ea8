"""The inference engine: requests in, tokens out. It knows no server."""
