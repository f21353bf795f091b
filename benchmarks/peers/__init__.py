"""Peers' own code on the reference model, measured as the leaderboard measures our recipes.

``python -m benchmarks.peers`` installs every peer in a virtual environment of its own, has it quantize the reference
checkpoint with our calibration samples, and evaluates what it saved. It writes ``docs/peers.csv`` and the table of
``docs/leaderboard.md``. All but these two lies in ``.peers/``; what is there already is not done again.

The ``by_*`` modules run in a peer's environment, without this project's packages. Each takes the folders of the
checkpoint and of the output, the file of the samples, and settings as JSON. It leaves in the output folder what the
peer saves (``stored/``), the model that the peer makes of that again (``dense/model.safetensors``, names as in the
checkpoint), and ``run.json`` with the settings.
"""
