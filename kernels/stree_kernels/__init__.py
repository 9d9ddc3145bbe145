"""Every op of a forward pass over a tree: a Triton kernel and its torch reference, `name_ref`.

Rooms hold the ops of one kind of layer; import an op from its module, as in
`from stree_kernels.ssm.tree_scan import tree_scan`. docs/api.md lists them.
"""
