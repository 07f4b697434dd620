"""The routes, one file per resource: parse, ask the server's parts, map the result."""
