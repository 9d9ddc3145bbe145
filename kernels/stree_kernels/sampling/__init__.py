"""From logits to tokens: top tokens, uniform numbers, children, and the accepted path."""
