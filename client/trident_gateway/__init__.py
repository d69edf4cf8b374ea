"""An OpenAI-compatible HTTP gateway before the gRPC doors of one or several Trident servers."""
