"""The launcher behind scripts/serve: finds a Triton server, starts it with a private model repository, ends it.

Knows neither the engine nor text; it talks to the server as any client does.
"""
