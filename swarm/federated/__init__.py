"""One adapter trained by several clients whose data stays with them: rounds between peers, without a coordinator.

client.federated ─► exchange (loop) ─► agreement (pure): whose updates count
                       │      ◄──────── updates: bytes of peers ─► checked numbers
                       ├─ roll: who takes part, in the DHT
                       └─► aggregate (pure) ─► low_rank: the same bits everywhere
"""
