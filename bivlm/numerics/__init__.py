"""The arithmetic that methods share: statistics of weights and inputs, error feedback, grids, binary codes."""
