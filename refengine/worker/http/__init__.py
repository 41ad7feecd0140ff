"""The worker's HTTP side: the application, its routes, request bodies, responses, connections."""
