"""The server: HTTP in front, one engine behind it, typed messages between them."""
