"""Image-token pruning: tokens that matter little are dropped while a model reads its prompt.

They are dropped physically: layers compute on the tokens that are left, with their own positions, and the caches hold
no more than these. The logits are those of a model whose attention masks hide the others.
"""
