"""New base models: which are watched, what is new about them, and the events that say so."""
