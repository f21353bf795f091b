"""What to do to a model: the settings of every stage, read from YAML and checked."""
