"""A page that shows how a swarm is: what can be used now, who serves what, and how it was before.

    census ─► compose ─► State ─► monitor ─┬─► pages, pictures (HTML, SVG)       canary: a token a minute
    (DHT, Info)          (frozen)          ├─► /api/v1/state (JSON)              history: SQLite
                                           ├─► /metrics (Prometheus)
                                           └─► /events (who looks is told)

A room of its own: it watches the swarm from outside, as anybody could, and knows neither servers nor models from
within. Only `canary` may use `swarm.client`.
"""
