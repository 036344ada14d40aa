"""The Flower app of the server."""
