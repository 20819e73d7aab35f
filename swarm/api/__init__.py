"""An OpenAI-compatible door to a swarm: one process that is a client of the swarm and a web server for everybody else.

HTTP ─► app ─► requests (parse) ─► prompts (tokens) ─► engine ─► swarm.client ~~► servers
HTTP ◄─ app ◄─ replies (chunks) ◄────── Piece ◄──────────┘
"""
