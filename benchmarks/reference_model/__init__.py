"""How the reference model was made: architecture, training data, training, and its report."""
