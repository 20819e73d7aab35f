"""The client: embeddings, head and everything trainable, around blocks that run on servers."""
