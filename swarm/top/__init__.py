"""Watch a swarm or one server in a terminal: `census` of the health page, or a server's metrics, drawn with rich."""
