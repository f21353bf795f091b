"""The paper's tables 1 to 6: its models, the recipes of their columns, its figures, and ours beside them.

The paper (arXiv 2509.18763) compresses three models with AWQ, BiLLM and Bi-VLM, the language model alone and the whole
model (tables 4 to 6), and single components and their combinations (tables 1 to 3). It gives all of them "1 to 1.1
bit"; here every column has the bits that it stores.
"""
