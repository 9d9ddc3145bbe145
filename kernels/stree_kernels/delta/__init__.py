"""Gated delta rule layers over a token tree: convolution, scan and chunked prefill."""
