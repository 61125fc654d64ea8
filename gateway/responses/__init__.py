"""`/v1/responses`: answers whose log outlives connections, gateways and workers."""
