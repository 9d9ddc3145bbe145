"""State-space layers over a token tree: convolution and scan."""
