"""Bi-VLM: the linear layers of vision-language models at one to four bits a weight, counted as bytes on disk.

Importing this package registers the quantization method ``bivlm`` with transformers, after which
``AutoModelForImageTextToText.from_pretrained`` loads packed checkpoints.

Shapes are written as suffix letters, here and everywhere below:

====== ==========================================
letter meaning
====== ==========================================
``M``  out_features of a linear layer (rows)
``N``  in_features of a linear layer (columns)
``K``  groups of unsalient weights (``N_uns`` in the paper)
``S``  salient weights of a layer
``V``  distinct magnitudes in a layer
``T``  tokens
``B``  batch
``D``  hidden size
====== ==========================================
"""

import bivlm.checkpoint.transformers_plugin  # noqa: F401
