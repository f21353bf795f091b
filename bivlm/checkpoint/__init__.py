"""The tensors of a Hugging Face checkpoint one at a time, the packed checkpoint made from them, and its loading.

`reading` opens a folder, `linears` says which of its tensors are linear weights and of what component, `writing` makes
the packed folder, `safetensors_file` knows the format, `transformers_plugin` loads what was packed.
"""
