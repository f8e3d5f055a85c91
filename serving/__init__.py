"""gRPC in front of an engine: service, client, health, the server process."""
