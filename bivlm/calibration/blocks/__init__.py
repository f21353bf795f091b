"""A model one block at a time: what each block's linear layers take in, with one block's weights in memory.

`units` names the parts in the order in which they run, `model` runs one of them on what the parts before it gave,
`sites` adds up what its linear layers see, `encoded` holds the samples as the model takes them in.
"""
