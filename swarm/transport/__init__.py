"""Carries messages between peers: direct TLS 1.3 where a peer can be reached, else a libp2p stream."""
