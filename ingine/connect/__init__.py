"""Connections of workers and producers to a server. Only this package uses redis-py's internals."""
