"""One model: its layers, embeddings and head, the bits they get, block search, finishing, and an estimate."""
