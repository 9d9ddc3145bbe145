"""Static speculation trees: what a tree is, what a profile says, how a model decodes with one."""
