"""How worker and producer reach a server. Only here redis-py's internals are used."""
